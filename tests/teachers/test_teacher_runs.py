"""Whole runs with every kind of teacher, as the command line starts them, and how they end when something is wrong."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import main, tiny_config, write
from logprob_server import LogprobServer

from lit_distill.models import CausalLM, ModelSpec, load_model
from lit_distill.teachers import FrozenTeacher


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(pair, teacher: Any, *words: object, **data: Any) -> list[dict[str, str]]:
    """Train with a teacher, and return the rows of metrics.csv."""
    config = tiny_config(pair)
    config["model"]["teacher"] = teacher
    config["data"]["init_args"] |= data
    config["generation"]["max_prompts"] = 0
    main("fit", "--config", write(config, Path("run.yaml")), *words)
    newest = max(Path("runs/run").glob("version_*"), key=lambda folder: int(folder.name.split("_")[1]))
    with (newest / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def local(pair) -> dict[str, str]:
    return {"path": str(pair[1])}


@pytest.fixture
def server(pair):
    teacher = FrozenTeacher(CausalLM(load_model(ModelSpec(str(pair[1])), "teacher", None)))

    def logits(ids: list[int]) -> torch.Tensor:
        tokens = torch.tensor([ids])
        return teacher.head().logits(teacher(tokens, torch.ones_like(tokens))[0])

    with LogprobServer(logits, max_model_len=512) as running:
        yield running


def at(server, **settings: Any) -> dict[str, Any]:
    return {
        "class_path": "ServerTeacher",
        "init_args": {"url": server.url, "top_k": 8, "retries": 1, "timeout": 5.0, **settings},
    }


def test_routed_copies_of_one_teacher_train_as_that_teacher(pair) -> None:
    alone = fit(pair, local(pair))
    teachers = {"first": local(pair), "second": local(pair)}
    patterns = {"first": "[0-9]"}
    routed = fit(
        pair,
        {
            "class_path": "RoutedTeachers",
            "init_args": {"teachers": teachers, "patterns": patterns, "default": "second"},
        },
    )
    assert column(routed, "train/loss") == pytest.approx(column(alone, "train/loss"), rel=1e-5)
    assert column(routed, "val/reverse_kl") == pytest.approx(column(alone, "val/reverse_kl"), rel=1e-4)
    assert len(column(routed, "train/kd/first")) == len(column(routed, "train/kd/second")) == 4


def test_a_mixture_of_copies_trains_as_the_teacher(pair) -> None:
    alone = fit(pair, local(pair))
    teachers = {"a": local(pair), "b": local(pair)}
    mixed = fit(pair, {"class_path": "MixedTeachers", "init_args": {"teachers": teachers}})
    assert column(mixed, "train/loss") == pytest.approx(column(alone, "train/loss"), rel=1e-5)


def test_the_students_own_prompt_trains_as_the_teacher_alone(pair) -> None:
    alone = fit(pair, local(pair))
    prompted = fit(pair, {"class_path": "PromptedTeacher", "init_args": {"teacher": local(pair)}})
    assert column(prompted, "train/loss") == pytest.approx(column(alone, "train/loss"), rel=1e-5)


def test_an_aligned_teacher_of_the_same_tokenizer_trains_as_the_teacher_alone(pair) -> None:
    alone = fit(pair, local(pair))
    aligned = fit(pair, {"class_path": "AlignedTeacher", "init_args": {"teacher": local(pair)}})
    assert column(aligned, "train/loss") == pytest.approx(column(alone, "train/loss"), rel=1e-5)


@pytest.mark.parametrize("source", ["DatasetResponses", "StudentRollouts"])
def test_prompts_with_fields_reach_the_teacher_from_every_source(pair, source) -> None:
    teacher = {
        "class_path": "PromptedTeacher",
        "init_args": {"teacher": local(pair), "template": "Answer {output}.\n{student_prompt}"},
    }
    config = f"--model.source={source}"
    words = (config, "--model.source.max_new_tokens", "4") if source == "StudentRollouts" else (config,)
    rows = fit(pair, teacher, *words)
    assert len(column(rows, "train/kd")) == 4


@pytest.mark.parametrize("after", [["--model.teacher.decay", "0.9"], ["--model.teacher.every_n_steps", "2"]])
def test_a_student_that_follows_itself_resumes_exactly(pair, after) -> None:
    teacher = {"class_path": "StudentTeacher"}
    prompted = {"class_path": "PromptedTeacher", "init_args": {"teacher": {**teacher, "init_args": {}}}}
    prompted["init_args"]["template"] = "Say it. {student_prompt}"
    key, value = after
    prompted["init_args"]["teacher"]["init_args"][key.rsplit(".", 1)[1]] = float(value) if "." in value else int(value)
    whole = fit(pair, prompted, "--trainer.max_steps", "6", "--run_name", "run")
    fit(pair, prompted, "--trainer.max_steps", "3", "--trainer.val_check_interval", "3")
    rest = fit(pair, prompted, "--trainer.max_steps", "6", "--ckpt_path", "last")
    assert column(rest, "train/loss")[-3:] == column(whole, "train/loss")[-3:]


@pytest.mark.filterwarnings("ignore:.* does not answer:UserWarning")
def test_a_server_teacher_trains_and_resumes_after_it_was_gone(pair, server) -> None:
    whole = fit(pair, at(server))
    fit(pair, at(server), "--trainer.max_steps", "2")
    server.faults.down = 10**6
    with pytest.raises(
        SystemExit,
        match=r"model\.teacher\.init_args\.url: .* did not answer in 2 attempts .* resume the run with --ckpt_path last",
    ):
        fit(pair, at(server), "--ckpt_path", "last")
    server.faults.down = 0
    rest = fit(pair, at(server), "--ckpt_path", "last")
    assert column(rest, "train/loss")[-2:] == pytest.approx(column(whole, "train/loss")[-2:], rel=1e-6)


KEY = r"model\.teacher\.init_args\."
FAULTS = {
    "shifted": (
        "shifted",
        True,
        r"model\.teacher\.init_args\.url: .* did not score the ids that were sent: token 1 of train-",
    ),
    "fewer": ("fewer", 3, r"model\.teacher\.init_args\.top_k: .* returned . instead of 8"),
    "no numbers": ("not_finite", True, r"model\.teacher\.init_args\.url: .* not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_ends_the_run_with_key_and_reason(pair, server, fault) -> None:
    name, value, message = FAULTS[fault]
    setattr(server.faults, name, value)
    with pytest.raises(SystemExit, match=message):
        fit(pair, at(server), "--trainer.num_sanity_val_steps", "0")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"class_path": "RoutedTeachers", "init_args": {"teachers": {}, "column": "x"}},
            KEY + r"teachers: there are none",
        ),
        (
            {"class_path": "StudentTeacher", "init_args": {"decay": 2.0}},
            KEY + r"decay: expected a number in \[0, 1\), got 2",
        ),
        (
            {
                "class_path": "RoutedTeachers",
                "init_args": {"teachers": {"a": {"path": "nowhere/x/y"}}, "column": "instruction"},
            },
            r"model\.teacher\.init_args\.teachers\.a\.path: nowhere/x/y does not exist",
        ),
        (
            {"class_path": "CachedTeacher", "init_args": {"path": "nothing"}},
            KEY + r"path: nothing holds no cache\.json",
        ),
    ],
)
def test_a_wrong_teacher_is_refused_with_its_key(pair, teacher, message) -> None:
    with pytest.raises(SystemExit, match=message):
        fit(pair, teacher)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("TeacherRollouts", r"model\.source: .* needs a local model, but the teacher is a MixedTeachers"),
        ("TeacherMixedRollouts", r"model\.source: .* needs a local model, but the teacher is a MixedTeachers"),
    ],
)
def test_a_source_in_which_the_teacher_generates_needs_a_local_one(pair, source, message) -> None:
    mixed = {"class_path": "MixedTeachers", "init_args": {"teachers": {"a": local(pair)}}}
    with pytest.raises(SystemExit, match=message):
        fit(pair, mixed, f"--model.source={source}")


def test_replayed_texts_have_no_record_for_the_teacher(pair) -> None:
    routed = {"class_path": "RoutedTeachers", "init_args": {"teachers": {"a": local(pair)}, "column": "instruction"}}
    with pytest.raises(SystemExit, match=r"model\.source: ReplayRollouts forgets which record .* RoutedTeachers needs"):
        fit(pair, routed, "--model.source=ReplayRollouts")


def test_a_column_that_no_record_has_is_named(pair) -> None:
    routed = {"class_path": "RoutedTeachers", "init_args": {"teachers": {"a": local(pair)}, "column": "subject"}}
    with pytest.raises(SystemExit, match=r"the field `subject` is missing"):
        fit(pair, routed)


def test_routing_by_a_column_reads_it_from_the_records(pair) -> None:
    made = {"column": "instruction", "default": "Sort the numbers", "teachers": {"Sort the numbers": local(pair)}}
    rows = fit(pair, {"class_path": "RoutedTeachers", "init_args": made})
    assert column(rows, "train/kd/Sort the numbers") == pytest.approx(column(rows, "train/kd"), rel=1e-6)
