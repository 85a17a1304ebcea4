"""`lit-distill cache`: what it writes, how it goes on after it was stopped, and what it refuses."""

from __future__ import annotations

import re
import shutil
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from caches import (
    ALL_SPLITS,
    FORMS,
    QUIET,
    assert_same,
    cache,
    cached,
    config_of,
    distinct_teacher,
    every_form,
    from_cache,
    live,
    num_texts,
    refusal,
    small_data,
    values_of,
    weights_of,
)
from command_line import main, run, write
from filelock import FileLock
from lightning.pytorch import Callback
from processes import exit_status
from torch import Tensor

from lit_distill.cli.trainer import DistillTrainer
from lit_distill.files import temporary_path
from lit_distill.models import LoraSpec, ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL, NextToken
from lit_distill.teachers import FrozenTeacher, RoutedTeachers, ServerTeacher, StudentTeacher
from lit_distill.teachers.store import SETTINGS, CacheSettings, Shards


@pytest.fixture(scope="module")
def sharp(pair, tmp_path_factory) -> tuple[Path, Path]:
    """A student, and a teacher whose predictions are far from uniform."""
    return pair[0], distinct_teacher(pair[1], tmp_path_factory.mktemp("sharp") / "teacher")


@pytest.fixture(scope="module")
def caches(sharp, tmp_path_factory) -> dict[str, Path]:
    return every_form(sharp, tmp_path_factory.mktemp("caches"))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_two_commands_train_without_the_teacher(sharp, tmp_path) -> None:
    gone = shutil.copytree(sharp[1], tmp_path / "gone")
    config = write(config_of((sharp[0], gone)), tmp_path / "run.yaml")
    folder = tmp_path / "my caches" / "ü"
    run("cache", "--config", config, "--path", folder)
    whole = run("fit", "--config", config)
    shutil.rmtree(gone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CachedTeacher replaces the model of the config
        cli = run("fit", "--config", config, "--model.teacher", "CachedTeacher", "--model.teacher.path", folder)
    torch.testing.assert_close(weights_of(cli), weights_of(whole), rtol=0, atol=1e-6)


TWO = ("--splits", "[train, validation]")


def test_the_command_says_what_it_will_write_what_it_wrote_and_how_to_train(sharp, tmp_path, caplog) -> None:
    with warnings.catch_warnings(record=True) as warned:
        run("cache", "--config", write(config_of(sharp), tmp_path / "run.yaml"), "--path", tmp_path / "a cache", *TWO)
    assert "48 items of train, 10 items of validation, at most 492 tokens of 96 bytes" in caplog.text
    assert "58 texts, 492 tokens, 0.1 MiB" in caplog.text
    assert f"--model.teacher CachedTeacher --model.teacher.path '{tmp_path / 'a cache'}'" in caplog.text
    assert "predict" not in caplog.text + "".join(
        str(warning.message) for warning in warned
    )  # of Lightning, or as a split


def test_it_makes_no_run(sharp, tmp_path) -> None:
    run("cache", "--config", write(config_of(sharp), tmp_path / "run.yaml"), "--path", "c")
    assert {file.name for file in tmp_path.iterdir()} == {"run.yaml", "c"}
    assert {file.name for file in (tmp_path / "c").iterdir()} == {"cache.json", "head.safetensors", "shards"}


def test_the_student_is_not_loaded(sharp, tmp_path) -> None:
    student = tmp_path / "student"
    shutil.copytree(sharp[0], student)
    (student / "model.safetensors").unlink()
    cache(live((student, sharp[1])), tmp_path / "c")
    assert num_texts(tmp_path / "c") == 58


@pytest.mark.parametrize("form", FORMS)
def test_a_trainer_may_write_a_cache_and_then_train(sharp, tmp_path, form) -> None:
    seen = []

    class Counts(Callback):
        def on_predict_start(self, trainer, pl_module) -> None:
            seen.append("predict")

        def on_train_end(self, trainer, pl_module) -> None:
            seen.append("fit")

    module, data = live(sharp), small_data()
    trainer = DistillTrainer(**QUIET, max_steps=2, limit_val_batches=0, callbacks=[Counts()])
    trainer.cache(module, data, path=str(tmp_path / "c"), form=form)
    trainer.fit(module, data)
    assert seen == ["fit"]
    assert trainer.global_step == 2


class TeacherFailedError(Exception):
    pass


def fail_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Let the teacher fail, once it has answered for some batches."""
    answer, left = FrozenTeacher.target_rows, iter(range(batches))

    def failing(self: FrozenTeacher, sequences: Any) -> Tensor:
        if next(left, None) is None:
            raise TeacherFailedError
        return answer(self, sequences)

    monkeypatch.setattr(FrozenTeacher, "target_rows", failing)
    monkeypatch.setattr("lit_distill.teachers.writing.SHARD_BYTES", 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_failed_goes_on_to_the_same_texts_and_values(sharp, caches, tmp_path, monkeypatch, form) -> None:
    with monkeypatch.context() as patch:
        fail_after(patch, 4)
        with pytest.raises(TeacherFailedError):
            cache(live(sharp), tmp_path / "c", form=form)
    assert not CacheSettings.read(tmp_path / "c", "path").complete
    assert num_texts(tmp_path / "c") == 16
    cache(live(sharp), tmp_path / "c", small_data(eval_batch_size=7), form=form, splits=ALL_SPLITS)
    assert CacheSettings.read(tmp_path / "c", "path").complete
    assert_same(values_of(tmp_path / "c"), values_of(caches[form]))


@pytest.mark.parametrize("form", FORMS)
def test_a_complete_cache_is_not_computed_again(sharp, caches, tmp_path, monkeypatch, form) -> None:
    folder = shutil.copytree(caches[form], tmp_path / "c")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    fail_after(monkeypatch, 0)
    cache(live(sharp), folder, form=form, splits=ALL_SPLITS)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_further_splits_are_added(sharp, caches, tmp_path) -> None:
    folder = cache(live(sharp), tmp_path / "c")
    assert num_texts(folder) == 58
    cache(live(sharp), folder, splits=("test",))
    assert_same(values_of(folder), values_of(caches["hidden"]))
    assert CacheSettings.read(folder, "path").data == "48 items of train, 10 items of validation, 4 items of test"


def test_a_run_that_failed_before_its_first_text_may_have_other_settings(sharp, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        fail_after(patch, 0)
        with pytest.raises(TeacherFailedError):
            cache(live(sharp), tmp_path / "c")
    cache(live(sharp), tmp_path / "c", form="topk", top_k=7)
    assert CacheSettings.read(tmp_path / "c", "path").top_k == 7


def test_a_moved_teacher_may_go_on(sharp, tmp_path) -> None:
    folder = cache(live(sharp), tmp_path / "c")
    moved = shutil.copytree(sharp[1], tmp_path / "moved")
    cache(live((sharp[0], moved)), folder, splits=ALL_SPLITS)
    assert num_texts(folder) == 62


def test_a_cache_is_written_from_one_of_hidden_states(sharp, caches, tmp_path) -> None:
    cache(from_cache(sharp[0], caches["hidden"]), tmp_path / "c", form="topk")
    expected = values_of(caches["topk"])
    found = values_of(tmp_path / "c")
    assert_same(found, {key: expected[key] for key in found})
    settings = [CacheSettings.read(folder, "path") for folder in (tmp_path / "c", caches["topk"])]
    assert settings[0].identity == settings[1].identity


KILLER = """
import os, signal, sys
from lit_distill.cli import main
from lit_distill.teachers import FrozenTeacher, writing

writing.SHARD_BYTES = 0
answer, left = FrozenTeacher.target_rows, iter(range(4))

def killed(self, sequences):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, sequences)

if __name__ == "__main__":
    FrozenTeacher.target_rows = killed
    main(["cache", "--config", sys.argv[1], "--path", sys.argv[2], "--form", sys.argv[3]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_goes_on_to_the_same_texts_and_values(sharp, caches, tmp_path, form) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    config = write(config_of(sharp), tmp_path / "run.yaml")
    status, output = exit_status(tmp_path / "killer.py", config, tmp_path / "c", form)
    assert status == -signal.SIGKILL, output[-3000:]
    assert num_texts(tmp_path / "c") == 16
    assert "is not finished" in refusal("fit", "--config", write(config_of(sharp, cached(tmp_path / "c")), config))
    run("cache", "--config", write(config_of(sharp), config), "--path", tmp_path / "c", "--form", form)
    whole, found = values_of(caches[form]), values_of(tmp_path / "c")
    assert len(found) == 62
    assert_same(found, {key: whole[key] for key in found})


# --- refused


def refused(module: DistillationModule, folder: Path, match: str, data: Any = None, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        cache(module, folder, data, **options)


def test_a_run_without_a_teacher_is_refused(sharp, tmp_path) -> None:
    module = DistillationModule(ModelSpec(str(sharp[0])), {"ce": NextToken()})
    refused(module, tmp_path / "c", r"^teacher: there is none to cache. Set model.teacher.path")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "topk"}, "^top_k: 64, but the teacher knows the probabilities of 16 tokens. Give 16 or fewer"),
        (
            {"form": "sampled"},
            "^form: sampled draws from all tokens, but the teacher knows the probabilities of 16 of them",
        ),
    ],
)
def test_more_than_a_server_tells_is_not_stored(sharp, tmp_path, options, words) -> None:
    served = ServerTeacher("http://localhost:9", top_k=16)
    teacher = RoutedTeachers({"a": served, "b": ModelSpec(str(sharp[1]))}, default="a", column="which")
    for one in (served, teacher):
        module = DistillationModule(ModelSpec(str(sharp[0])), {"kd": ForwardKL()}, one)
        refused(module, tmp_path / "c", words, **options)


@pytest.mark.parametrize(("name", "form"), [("top_k", "topk"), ("num_draws", "sampled")])
def test_an_option_of_another_form_is_refused(sharp, tmp_path, name, form) -> None:
    refused(live(sharp), tmp_path / "c", f"^{name}: 16 belongs to form {form}, but form is hidden", **{name: 16})


@pytest.mark.parametrize("routed", [False, True])
def test_a_teacher_that_shares_the_students_weights_is_refused(sharp, tmp_path, routed) -> None:
    student = ModelSpec(str(sharp[0]), lora=LoraSpec(r=2))
    shared: Any = ModelSpec(str(sharp[0]), shared_with_student=True)
    teacher = RoutedTeachers({"a": shared}, default="a", column="which") if routed else shared
    module = DistillationModule(student, {"kd": ForwardKL()}, teacher)
    refused(module, tmp_path / "c", r"shared_with_student: a cache needs a teacher of its own", form="topk")


def test_a_teacher_that_follows_the_student_is_refused(sharp, tmp_path) -> None:
    module = DistillationModule(ModelSpec(str(sharp[0])), {"kd": ForwardKL()}, StudentTeacher())
    refused(module, tmp_path / "c", "^teacher: StudentTeacher follows the student", form="topk")


def test_hidden_states_of_a_cache_are_refused(sharp, caches, tmp_path) -> None:
    module = from_cache(sharp[0], caches["hidden"])
    refused(module, tmp_path / "c", "^form: hidden needs a local model as the teacher. Choose form: topk or sampled")


@pytest.mark.parametrize(
    ("form", "tail", "words"),
    [("sampled", "spread", "a cache of form sampled"), ("topk", "renormalize", "tail: renormalize")],
)
def test_a_cache_that_lacks_most_tokens_is_not_cached_again(sharp, caches, tmp_path, form, tail, words) -> None:
    refused(from_cache(sharp[0], caches[form], tail), tmp_path / "c", f"^teacher: {words}", form="topk")


def test_a_folder_with_other_files_is_refused_and_left_alone(sharp, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(
        live(sharp), tmp_path / "mine", r"^path: .*mine has other files in it, such as thesis.txt. Give an empty folder"
    )
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_what_a_run_left_that_was_killed_as_it_began_is_no_other_file(sharp, tmp_path) -> None:
    (tmp_path / "c").mkdir()
    temporary_path(tmp_path / "c" / SETTINGS).write_text("{")
    assert num_texts(cache(live(sharp), tmp_path / "c")) == 58


@pytest.mark.parametrize("below", [False, True])
def test_a_path_that_cannot_be_a_folder_is_refused(sharp, tmp_path, below) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "c" if below else tmp_path / "file"
    refused(live(sharp), path, r"^path: .* cannot be written, because .*file is not a writable folder")


@pytest.mark.parametrize(
    ("form", "options", "words"),
    [
        ("hidden", {"form": "topk"}, "form 'hidden', not 'topk'"),
        ("topk", {"form": "sampled"}, "form 'topk', not 'sampled'"),
        ("topk", {"form": "topk", "top_k": 7}, "top_k 64, not 7"),
        ("sampled", {"form": "sampled", "num_draws": 7}, "num_draws 50, not 7"),
        ("hidden", {"dtype": "bfloat16"}, "dtype 'float32', not 'bfloat16'"),
    ],
)
def test_other_settings_for_the_same_folder_are_refused(sharp, caches, form, options, words) -> None:
    refused(
        live(sharp),
        caches[form],
        rf"^path: the cache .* was written with {words}. Give the same settings, or",
        **options,
    )
    assert CacheSettings.read(caches[form], "path").complete


def test_another_teacher_for_the_same_folder_is_refused_before_it_loads(pair, sharp, caches, monkeypatch) -> None:
    monkeypatch.setattr("lit_distill.teachers.local.FrozenTeacher", None)
    words = re.escape(f"was written with another teacher: {sharp[1]}, not {pair[1]}")
    refused(live(pair), caches["hidden"], rf"^path: the cache .* {words}")


def test_another_tokenizer_for_the_same_folder_is_refused(sharp, caches) -> None:
    refused(
        live(sharp), caches["hidden"], "was written with another tokenizer", small_data(turns=2)
    )  # has a chat template


def test_two_runs_at_once_are_refused(sharp, caches, tmp_path) -> None:
    folder = shutil.copytree(caches["hidden"], tmp_path / "c")
    with FileLock(folder / ".running"):
        refused(live(sharp), folder, "^path: another process is writing the cache")
    assert CacheSettings.read(folder, "path").complete


@pytest.fixture
def free(monkeypatch) -> Any:
    """Sets how many bytes are left on the disk."""

    def leave(num_bytes: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=num_bytes))

    return leave


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(sharp, tmp_path, free) -> None:
    free(492 * 96 - 1)
    refused(
        live(sharp), tmp_path / "c", r"^path: the cache takes about 0.0 GiB, but .* has 0.0 GiB left. Give another disk"
    )
    assert not list((tmp_path / "c").glob("*"))


def test_a_disk_that_may_be_too_small_for_draws_is_warned_of(sharp, tmp_path, free, monkeypatch) -> None:
    free(492 * 101 - 1)
    monkeypatch.setattr("lit_distill.files.FULL_DISK_BYTES", 0)
    with pytest.warns(UserWarning, match=r"path: the cache takes at most 0.0 GiB"):
        cache(live(sharp), tmp_path / "c", form="sampled")


def test_what_is_on_the_disk_needs_no_more_space(sharp, caches, tmp_path, free) -> None:
    folder = shutil.copytree(caches["hidden"], tmp_path / "c")
    free(0)
    cache(live(sharp), folder, splits=ALL_SPLITS)
    assert Shards(folder).num_bytes > 492 * 96


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "topk", "top_k": 513}, "^top_k: expected at most 512, the number of tokens, got 513"),
        ({"form": "topk", "top_k": 0}, "^top_k: expected at least 1, got 0"),
        ({"form": "sampled", "num_draws": 64}, "^num_draws: expected at most 63, got 64"),
        ({"form": "hiden"}, "^form: expected hidden, topk or sampled, got 'hiden'"),
        ({"splits": ("trian",)}, "^splits: expected some of train, validation, test, got 'trian'"),
        ({"splits": ()}, "^splits: the data has no items"),
    ],
)
def test_an_impossible_option_is_refused_before_anything_is_written(sharp, tmp_path, options, words) -> None:
    refused(live(sharp), tmp_path / "c", words, **options)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "option", [{"limit_predict_batches": 2}, {"limit_predict_batches": 0.5}, {"fast_dev_run": True}]
)
def test_a_trainer_that_leaves_out_items_is_refused(sharp, tmp_path, option) -> None:
    trainer = DistillTrainer(**QUIET, **option)
    with pytest.raises(ValueError, match=f"^trainer.{next(iter(option))}: a cache needs every item"):
        trainer.cache(live(sharp), small_data(), path=str(tmp_path / "c"))


def test_data_without_responses_are_refused(sharp, tmp_path) -> None:
    refused(
        live(sharp),
        tmp_path / "c",
        r"^data.init_args.responses: the data has no responses",
        small_data(responses=False),
    )


def test_a_data_module_that_cannot_give_every_item_is_refused(sharp, tmp_path) -> None:
    refused(live(sharp), tmp_path / "c", "^data: LightningDataModule has no method every_item", L.LightningDataModule())


def test_items_that_are_longer_than_the_teachers_context_are_refused(sharp, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(sharp[1])
    model.config.max_position_embeddings = 16
    model.save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(sharp[1]).save_pretrained(tmp_path / "short")
    words = r"^data.init_args.max_length: the split \w+ has an item of \d+ tokens, but the context length of model.teacher is 16"
    refused(live((sharp[0], tmp_path / "short")), tmp_path / "c", words)


def test_a_teacher_that_overflows_is_named_by_its_key(sharp, tmp_path, monkeypatch) -> None:
    answer = FrozenTeacher.target_rows
    monkeypatch.setattr(FrozenTeacher, "target_rows", lambda self, text: answer(self, text) * float("inf"))
    message = refusal("cache", "--config", write(config_of(sharp), tmp_path / "run.yaml"), "--path", tmp_path / "c")
    assert "error: model.teacher: its hidden states for the item 'train-" in message
    assert "Set model.teacher.dtype: float32 or bfloat16" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "error: the following arguments are required"),
        (("--path", "c", "--form", "hiden"), r'error: Parser key "form":'),
        (("--path", "c", "--splits", "[trian]"), "error: splits: expected some of"),
        (("--path", "c", "--trainer.fast_dev_run", "true"), "error: trainer.fast_dev_run: a cache needs every item"),
    ],
)
def test_the_command_line_says_so_in_one_message(sharp, tmp_path, capsys, arguments, words) -> None:
    with pytest.raises(SystemExit) as stop:
        main("cache", "--config", write(config_of(sharp), tmp_path / "run.yaml"), *arguments)
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_a_teacher_of_another_tokenizer_is_refused_before_anything_is_written(sharp, tmp_path) -> None:
    aligned = {"class_path": "AlignedTeacher", "init_args": {"teacher": {"path": str(sharp[1])}}}
    message = refusal(
        "cache", "--config", write(config_of(sharp, aligned), tmp_path / "run.yaml"), "--path", tmp_path / "c"
    )
    assert "model.teacher: it has another tokenizer" in message
    assert not (tmp_path / "c").exists()
