"""What is wrong in a YAML file is said in a few lines that name the key, before anything is loaded."""

from __future__ import annotations

import sys

import pytest
from command_line import main, tiny_config, write

TYPOS = {
    "modle": {"student": {"path": "x"}},
    "run_nmae": "x",
    "model.studnet": {"path": "x"},
    "model.student.pth": "x",
    "model.teacher.dtpe": "x",
    "model.objectives.ce.init_args.wieght": 1.0,
    "model.objectives.kd": "ForwardKl",
    "model.prediction.speeker": "student",
    "model.optimizer": {"class_path": "AdamW", "init_args": {"learning_rate": 0.1}},
    "model.lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"warmup": 1}},
    "data.init_args.batchsize": 3,
    "data.class_path": "ProceduralDta",
    "trainer.max_step": 3,
    "trainer.callbacks": [{"class_path": "BeforeAfter", "init_args": {"sed": 1}}],
    "checkpoint.montior": "x",
    "generation.max_new_token": 3,
    "export.dtyp": "float32",
}
WORDS = {
    "model.objectives.kd": "'ForwardKL'",
    "model.optimizer": "'learning_rate'",
    "model.lr_scheduler": "'warmup_steps'",
    "data.class_path": "'ProceduralData'",
    "trainer.callbacks": "'seed'",
}


@pytest.fixture
def command(pair, tmp_path, monkeypatch):
    """`lit-distill fit` with one key of the config set, as a function that returns the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def fit(key: str, value: object) -> object:
        config = node = tiny_config(pair)
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
        with pytest.raises(SystemExit) as stop:
            main("fit", "--config", write(config, tmp_path / "wrong.yaml"))
        return stop.value.code

    return fit


@pytest.mark.parametrize("key", TYPOS)
def test_a_typo_is_named_in_a_few_lines(command, capsys, key: str) -> None:
    assert command(key, TYPOS[key]) == 2
    said = capsys.readouterr().err
    assert WORDS.get(key, key.rpartition(".")[2]) in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) <= 12
    assert "Traceback" not in said


def test_what_was_probably_meant_is_said(command, capsys) -> None:
    command("trainer.max_step", 3)
    assert "Did you mean 'trainer.max_steps'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--config", "right.yaml", "--trainer.max_stepz", "3"], "'trainer.max_steps'"),
        (["--config", "rihgt.yaml"], "right.yaml"),
    ],
)
def test_a_misspelt_word_of_the_command_line_has_a_suggestion(
    pair, tmp_path, monkeypatch, capsys, words, meant
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tiny_config(pair), tmp_path / "right.yaml")
    with pytest.raises(SystemExit) as stop:
        main("fit", *words)
    assert f"Did you mean {meant}?" in f"{stop.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.init_args.batch_size", 0, "data.init_args.batch_size: expected at least 1, got 0"),
        ("generation.max_prompts", -5, "generation.max_prompts: expected -1"),
        ("model.micro_batch_size", 0, "model.micro_batch_size: expected at least 1, got 0"),
        ("model.teacher", None, "Set model.teacher.path"),
        ("export.dtype", "int8", "export.dtype: expected float32"),
        ("trainer.accumulate_grad_batches", 2, "model.micro_batch_size"),
        ("ckpt_path", "nowhere.ckpt", "ckpt_path: there is no nowhere.ckpt"),
    ],
)
def test_a_value_that_cannot_be_is_one_message_without_traceback(command, capsys, key, value, words) -> None:
    message = command(key, value)
    assert message.startswith("error: ")
    assert words in message
    assert "Traceback" not in capsys.readouterr().err


def test_the_traceback_is_there_for_who_asks(command, monkeypatch) -> None:
    monkeypatch.setenv("LIT_DISTILL_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"generation\.max_prompts"):
        command("generation.max_prompts", -5)


@pytest.mark.parametrize("key", ["model.teacher", "model.reference"])
def test_a_path_in_place_of_a_teacher_is_told_where_it_belongs(command, capsys, key) -> None:
    command(key, "Qwen/Qwen2.5-7B-Instruct")
    shown = capsys.readouterr().err
    assert (
        f"{key}: Qwen/Qwen2.5-7B-Instruct is no class. For a model give {key}: {{path: Qwen/Qwen2.5-7B-Instruct}}"
        in shown
    )


def test_a_wrong_argument_of_a_known_class_is_not_called_an_unknown_class(command, capsys) -> None:
    command("model.teacher", {"class_path": "MixedTeachers", "init_args": {"weights": [0.7], "teachers": {}}})
    shown = capsys.readouterr().err
    assert "Expected a <class 'dict'>" in shown
    assert 'Parser key "weights"' in shown
    assert "no class" not in shown
    assert "import path" not in shown
