"""A run from a cache: with hidden states the run with the teacher, with other forms what they allow, and otherwise a message."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from caches import (
    ALL_SPLITS,
    FORMS,
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
    weights_of,
)
from command_line import run, write
from lightning.pytorch import Callback
from tiny import tiny_llama
from torch import Tensor
from training import quiet_trainer, weights

from lit_distill.callbacks import BeforeAfter
from lit_distill.data import InstructionData
from lit_distill.data.records import Records
from lit_distill.data.synthetic import GeneratedCorpus
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    NextToken,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from lit_distill.teachers import PromptedTeacher
from lit_distill.teachers.store import CacheSettings

OBJECTIVES = {
    "forward_kl": {"kd": ForwardKL},
    "reverse_kl": {"kd": ReverseKL},
    "jensen_shannon": {"kd": JensenShannon},
    "skew_forward_kl": {"kd": SkewForwardKL},
    "skew_reverse_kl": {"kd": SkewReverseKL},
    "total_variation": {"kd": TotalVariation},
    "adaptive_kl": {"kd": AdaptiveKL},
    "next_token_and_kl": {"kd": ForwardKL, "ce": NextToken},
}


@pytest.fixture(scope="module")
def sharp(pair, tmp_path_factory) -> tuple[Path, Path]:
    """A student, and a teacher whose predictions are far from uniform."""
    return pair[0], distinct_teacher(pair[1], tmp_path_factory.mktemp("sharp") / "teacher")


@pytest.fixture(scope="module")
def caches(sharp, tmp_path_factory) -> dict[str, Path]:
    """A cache of each form, of a copy of the teacher that is no longer there."""
    folder = tmp_path_factory.mktemp("caches")
    gone = shutil.copytree(sharp[1], folder / "gone")
    written = every_form((sharp[0], gone), folder)
    shutil.rmtree(gone)
    return written


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_loss_terms(self, trainer, pl_module, terms) -> None:
        self.losses.append(terms["loss"])


FAST = ("forward_kl", "reverse_kl", "adaptive_kl", "next_token_and_kl")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in OBJECTIVES]
)
def test_fifty_steps_from_hidden_states_are_those_with_the_teacher(sharp, caches, tmp_path, kind) -> None:
    runs = []
    for from_disk in (False, True):
        losses = Losses()
        objectives = {name: objective() for name, objective in OBJECTIVES[kind].items()}
        module = (
            from_cache(sharp[0], caches["hidden"], objectives=objectives)
            if from_disk
            else live(sharp, objectives=objectives)
        )
        quiet_trainer(tmp_path, 50, callbacks=[losses]).fit(module, small_data())
        runs.append((torch.stack(losses.losses), weights(module)))
    assert len(runs[0][0]) == 50
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "module"),
    [
        ({}, {"padding_free": False}),
        ({}, {"micro_batch_size": 3}),
        ({"tokens_per_batch": 100, "group_by_length": True}, {}),
        ({"turns": 3, "num_train": 16}, {}),
        pytest.param({"turns": 3, "num_train": 16, "assistant_turns": "each"}, {}, marks=pytest.mark.slow),
        pytest.param({"turns": 3, "num_train": 16, "assistant_turns": "last"}, {}, marks=pytest.mark.slow),
        (
            {"corpus": GeneratedCorpus(length=16, batch_size=8, num_documents=100)},
            {"corpus_objectives": {"lm": NextToken()}},
        ),
    ],
    ids=["padded", "micro_batches", "tokens_per_batch", "chat", "each_turn", "last_turn", "corpus"],
)
def test_a_run_from_hidden_states_is_the_run_with_the_teacher(sharp, tmp_path, data, module) -> None:
    folder = cache(live(sharp), tmp_path / "c", small_data(**data))
    runs = []
    for learner in (live(sharp, **module), from_cache(sharp[0], folder, **module)):
        quiet_trainer(tmp_path, 6).fit(learner, small_data(**data))
        runs.append(weights(learner))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-6)


def records(path: Path, rows: list[dict[str, Any]]) -> Records:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return Records(str(path))


def test_odd_items_are_found(sharp, tmp_path) -> None:
    rows = [
        {"id": "same", "instruction": "Count.", "output": "1 2 3"},
        {"id": "same", "instruction": "Count.", "output": "1 2 3"},  # the same item twice
        {"id": "same", "instruction": "Count.", "output": "3 2 1"},  # another text with its id
        {"id": "ü/😀\n", "instruction": "Sort.", "output": "a"},
        {"id": "", "instruction": ".", "output": "b"},
        {"id": "17", "instruction": "Sort.", "output": "c"},
        {"id": "without an answer", "instruction": "Sort.", "output": ""},
    ]
    train = records(tmp_path / "train.jsonl", rows)
    validation = records(tmp_path / "validation.jsonl", [{**rows[0], "id": "the same text in another split"}])

    def data() -> InstructionData:
        return InstructionData(
            train,
            validation=validation,
            template="{instruction}\n",
            empty_responses="drop",
            batch_size=2,
            eval_batch_size=3,
        )

    folder = cache(live(sharp), tmp_path / "c", data())
    assert num_texts(folder) == 5
    runs = []
    for learner in (live(sharp), from_cache(sharp[0], folder)):
        trainer = quiet_trainer(tmp_path, 6, limit_val_batches=1.0, num_sanity_val_steps=0)
        trainer.fit(learner, data())
        runs.append((weights(learner), trainer.callback_metrics["val/kd"]))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-6)


def test_data_without_items_to_validate_or_test_on(sharp, tmp_path) -> None:
    train = records(tmp_path / "t.jsonl", [{"instruction": "Count.", "output": str(number)} for number in range(8)])
    folder = cache(live(sharp), tmp_path / "c", InstructionData(train, batch_size=4), splits=ALL_SPLITS)
    assert num_texts(folder) == 8
    quiet_trainer(tmp_path, 2).fit(from_cache(sharp[0], folder), InstructionData(train, batch_size=4))


def test_a_teacher_with_more_rows_than_tokens(sharp, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sharp[0])
    for name, hidden, rows in (("student", 16, 520), ("teacher", 24, 576)):
        model = tiny_llama(hidden, rows, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pair = tmp_path / "student", tmp_path / "teacher"
    folder = cache(live(pair), tmp_path / "c")
    assert CacheSettings.read(folder, "path").vocabulary_size == len(tokenizer) == 512
    runs = []
    for learner in (live(pair), from_cache(pair[0], folder)):
        quiet_trainer(tmp_path, 4).fit(learner, small_data())
        runs.append(weights(learner))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings"), [("gemma2", {"final_logit_softcapping": 5.0}), ("granite", {"logits_scaling": 4.0})]
)
def test_a_teacher_that_caps_or_scales_its_logits(sharp, tmp_path, kind, settings) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sharp[0])
    sizes = {"vocab_size": 512, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 512}
    architectures.tiny(kind, **sizes, **settings).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    folder = cache(live((sharp[0], tmp_path / kind)), tmp_path / "c")
    runs = []
    for learner in (live((sharp[0], tmp_path / kind)), from_cache(sharp[0], folder)):
        quiet_trainer(tmp_path, 3).fit(learner, small_data())
        runs.append(weights(learner))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"form": "hidden"}, {"form": "topk", "top_k": 512}], ids=["hidden", "topk"])
def test_a_teacher_with_its_own_prompt_is_cached(sharp, tmp_path, options) -> None:
    def prompted() -> DistillationModule:
        teacher = PromptedTeacher(ModelSpec(str(sharp[1])), template="Be brief.\n{student_prompt}")
        sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
        return DistillationModule(ModelSpec(str(sharp[0])), {"kd": ForwardKL()}, teacher, **sgd)

    folder = cache(prompted(), tmp_path / "c", **options)
    runs = []
    for learner in (prompted(), from_cache(sharp[0], folder)):
        quiet_trainer(tmp_path, 4).fit(learner, small_data())
        runs.append(weights(learner))
    atol = 1e-6 if options["form"] == "hidden" else 1e-4  # log-probabilities in bfloat16
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=atol)


def test_another_value_of_a_field_that_only_the_teacher_saw_is_refused(sharp, tmp_path) -> None:
    def data(rule: str) -> InstructionData:
        rows = [{"instruction": f"Count to {n}.", "output": "1 2 3", "rule": rule} for n in range(4)]
        part = records(tmp_path / f"{rule}.jsonl", rows)
        return InstructionData(part, validation=part, template="{instruction}", batch_size=4)

    teacher = PromptedTeacher(ModelSpec(str(sharp[1])), template="{rule}\n{student_prompt}")
    learner = DistillationModule(ModelSpec(str(sharp[0])), {"kd": ForwardKL()}, teacher)
    folder = cache(learner, tmp_path / "c", data("brief"), form="hidden")
    quiet_trainer(tmp_path, 1).fit(from_cache(sharp[0], folder), data("brief"))
    with pytest.raises(ValueError, match=r"path: the text of .* its record has another rule or student_prompt"):
        quiet_trainer(tmp_path, 1).fit(from_cache(sharp[0], folder), data("long"))


@pytest.fixture(scope="module")
def validated(sharp, caches, tmp_path_factory) -> Callable[[str], dict[str, float]]:
    """The metrics at the end of a short run with the teacher ("live"), or from a cache."""
    folder = tmp_path_factory.mktemp("validated")
    known: dict[str, dict[str, float]] = {}

    def metrics(kind: str) -> dict[str, float]:
        if kind not in known:
            config = config_of(sharp, None if kind == "live" else cached(caches[kind]))
            config["calibration"] = {"next_token": True}
            config["trainer"] |= {"default_root_dir": str(folder)}
            cli = run("fit", "--config", write(config, folder / f"{kind}.yaml"))
            known[kind] = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        return known[kind]

    return metrics


def test_metrics_from_hidden_states_are_those_with_the_teacher(validated) -> None:
    one, other = validated("live"), validated("hidden")
    assert one.keys() == other.keys() >= {"val/reverse_kl", "val/teacher_perplexity", "val/teacher_ece"}
    assert other == pytest.approx(one, rel=1e-5, abs=1e-6, nan_ok=True)


def test_top_k_has_the_metrics_of_both_models(validated) -> None:
    one, other = validated("live"), validated("topk")
    assert one.keys() == other.keys()
    assert other["val/teacher_perplexity"] == pytest.approx(one["val/teacher_perplexity"], rel=1e-3)


def test_draws_have_no_metrics_that_need_all_probabilities(validated) -> None:
    metrics = validated("sampled")
    without = {
        name
        for name in validated("live")
        if "teacher" in name or name.endswith(("forward_kl", "reverse_kl", "top1_agreement"))
    }
    assert validated("live").keys() - metrics.keys() == without
    assert metrics["val/ece"] == pytest.approx(validated("live")["val/ece"], abs=0.05)


@pytest.mark.parametrize("kind", FORMS)
def test_the_test_split_is_evaluated_from_a_cache_that_has_it(sharp, caches, tmp_path, kind) -> None:
    config = write(config_of(sharp, cached(caches[kind])), tmp_path / "run.yaml")
    metrics = run("test", "--config", config).trainer.callback_metrics
    assert {"test/kd", "test/rouge_l", "test/perplexity"} <= metrics.keys()
    assert ("test/teacher_perplexity" in metrics) == (kind != "sampled")
    assert "test/teacher_rouge_l" not in metrics  # it cannot generate


def test_a_split_that_was_not_cached_says_how_to_add_it(sharp, tmp_path) -> None:
    folder = cache(live(sharp), tmp_path / "c")
    message = refusal("test", "--config", write(config_of(sharp, cached(folder)), tmp_path / "run.yaml"))
    assert "error: model.teacher.init_args.path: the text of the item 'test-" in message
    assert "It was written for: 48 items of train, 10 items of validation." in message
    assert "--splits '[train, validation, test]'" in message


@pytest.mark.parametrize("kind", FORMS)
def test_the_table_of_a_run_from_a_cache_has_no_row_for_the_teacher(sharp, caches, tmp_path, kind) -> None:
    table = BeforeAfter(max_new_tokens=4)
    learner = from_cache(sharp[0], caches[kind])
    quiet_trainer(tmp_path, 2, callbacks=[table], limit_val_batches=1.0, num_sanity_val_steps=0).fit(
        learner, small_data()
    )
    assert list(table.metrics) == ["student before", "student after"]
    assert "perplexity" in table.table()


def test_exposure_bias_is_refused_before_weights_load(sharp, caches, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lit_distill.module.load_models", None)
    config = config_of(sharp, cached(caches["hidden"]))
    config["exposure_bias"] = {"max_prompts": 2, "every_n_validations": 1}
    message = refusal("fit", "--config", write(config, tmp_path / "run.yaml"))
    assert "exposure_bias.max_prompts: 2, but there is no teacher that can generate" in message


class Stop(Callback):
    """Ends a run in the middle."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 5:
            raise ConnectionError("the node is gone")


def resumable(sharp: tuple[Path, Path], teacher: Any) -> dict[str, Any]:
    config = config_of(sharp, teacher, lr_scheduler={"class_path": "WarmupCosine"})
    config["model"]["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 0.01}}
    config["trainer"] |= {"max_steps": 8}
    config["generation"] = {"max_prompts": 0}
    return config


def stopped(config: Path) -> None:
    with pytest.raises(ConnectionError, match="gone"):
        run("fit", "--config", config, trainer_defaults={"callbacks": [Stop()]})


@pytest.mark.parametrize("form", ["hidden", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(sharp, caches, tmp_path, form) -> None:
    config = resumable(sharp, cached(caches[form]))
    whole = run("fit", "--config", write(config, tmp_path / "whole.yaml"))
    stopped(write(config, tmp_path / "stopped.yaml"))
    resumed = run("fit", "--config", tmp_path / "stopped.yaml", "--ckpt_path", "last")
    assert resumed.trainer.global_step == 8
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_a_run_with_the_teacher_goes_on_from_its_cache(sharp, caches, tmp_path) -> None:
    whole = run("fit", "--config", write(resumable(sharp, None), tmp_path / "whole.yaml"))
    config = write(resumable(sharp, None), tmp_path / "stopped.yaml")
    stopped(config)
    write(resumable(sharp, cached(caches["hidden"])), config)
    resumed = run("fit", "--config", config, "--ckpt_path", "last")
    torch.testing.assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=1e-6)


def test_a_run_does_not_go_on_from_the_cache_of_another_teacher(pair, sharp, tmp_path) -> None:
    other = cache(live(pair), tmp_path / "c")
    config = write(resumable(sharp, None), tmp_path / "stopped.yaml")
    stopped(config)
    message = refusal("fit", "--config", write(resumable(sharp, cached(other)), config), "--ckpt_path", "last")
    assert f"model.teacher.path: {pair[1]} is another model than the checkpoint's teacher, {sharp[1]}" in message


@pytest.mark.parametrize(
    ("form", "objective", "settings", "words"),
    [
        (
            "sampled",
            "ReverseKL",
            {},
            r"ReverseKL is not linear .* Use ForwardKL .* or write the cache with form: hidden",
        ),
        ("sampled", "JensenShannon", {}, r"JensenShannon is not linear .* form: hidden"),
        (
            "sampled",
            {"class_path": "ForwardKL", "init_args": {"temperature": 2}},
            {},
            r"Use ForwardKL with temperature: 1",
        ),
        ("topk", "ReverseKL", {"tail": "renormalize"}, r"ReverseKL is infinite or undefined .* Set tail: spread"),
        ("topk", "AdaptiveKL", {"tail": "renormalize"}, r"AdaptiveKL is infinite or undefined .* Set tail: spread"),
    ],
)
def test_an_objective_that_the_form_would_bias_is_refused(
    sharp, caches, tmp_path, form, objective, settings, words
) -> None:
    config = config_of(sharp, cached(caches[form], **settings), objectives={"kd": objective})
    message = refusal("fit", "--config", write(config, tmp_path / "run.yaml"))
    assert "error: model.objectives.kd: " in message
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("form", "objectives", "settings"),
    [
        (
            "topk",
            ["ForwardKL", "JensenShannon", "SkewForwardKL", "SkewReverseKL", "TotalVariation"],
            {"tail": "renormalize"},
        ),
        ("topk", ["ReverseKL", "AdaptiveKL"], {}),
        ("sampled", ["ForwardKL", "NextToken"], {}),
    ],
)
def test_an_objective_that_the_form_allows_stays_finite(sharp, caches, tmp_path, form, objectives, settings) -> None:
    named = {name.lower(): name for name in objectives}
    config = config_of(sharp, cached(caches[form], **settings), objectives=named)
    config["trainer"]["limit_val_batches"] = 1
    metrics = run("fit", "--config", write(config, tmp_path / "run.yaml")).trainer.callback_metrics
    assert all(metrics[f"train/{name}"].isfinite() and metrics[f"val/{name}"].isfinite() for name in named)


@pytest.mark.parametrize(
    ("source", "objective", "words"),
    [
        (
            {"class_path": "StudentRollouts"},
            "ForwardKL",
            "answers only for the texts that it was written for. Set source: DatasetResponses",
        ),
        (
            {"class_path": "TeacherMixedRollouts", "init_args": {"max_new_tokens": 4, "mini_batch_size": 4}},
            "PolicyGradient",
            "which needs a local model, but the teacher is a CachedTeacher. Set model.teacher.path, or source: DatasetResponses",
        ),
        (
            {"class_path": "ResponsePairs", "init_args": {"max_new_tokens": 4, "mini_batch_size": 4}},
            "DirectPreference",
            "Set source: DatasetResponses",
        ),
        (
            {"class_path": "TeacherRollouts"},
            "NextToken",
            "which needs a local model, but the teacher is a CachedTeacher.",
        ),
    ],
    ids=["student", "mixed", "pairs", "teacher"],
)
def test_a_source_that_makes_new_texts_is_refused(sharp, caches, tmp_path, source, objective, words) -> None:
    config = config_of(sharp, cached(caches["hidden"]), source=source, objectives={"o": objective})
    message = refusal("fit", "--config", write(config, tmp_path / "run.yaml"))
    assert f"error: model.source: {source['class_path']}" in message
    assert words in message


def test_there_is_no_cache(sharp, tmp_path) -> None:
    message = refusal("fit", "--config", write(config_of(sharp, cached(tmp_path / "none")), tmp_path / "run.yaml"))
    assert message.startswith(f"error: model.teacher.init_args.path: {tmp_path / 'none'} holds no cache.json")
    assert "lit-distill cache --config" in message


def test_an_unfinished_cache_is_refused(sharp, caches, tmp_path) -> None:
    folder = shutil.copytree(caches["hidden"], tmp_path / "c")
    replace(CacheSettings.read(folder, "path"), complete=False).write(folder)
    message = refusal("fit", "--config", write(config_of(sharp, cached(folder)), tmp_path / "run.yaml"))
    assert message.startswith(f"error: model.teacher.init_args.path: the cache {folder} is not finished.")


def test_another_tokenizer_is_refused_before_the_index_is_read(sharp, caches, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lit_distill.teachers.cached.Shards", None)
    student = shutil.copytree(sharp[0], tmp_path / "student")
    config = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "another"}))
    given = config_of((student, sharp[1]), cached(caches["hidden"]))
    message = refusal("fit", "--config", write(given, tmp_path / "run.yaml"))
    assert "model.teacher.init_args.path: the cache" in message
    assert "another tokenizer or chat template than the student's" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task_seed": 1}, "the cache was not written for it"),
        ({"template": "{instruction}: {input}\n"}, "now and had|now and was"),
    ],
)
def test_other_data_are_refused_with_an_item(sharp, caches, tmp_path, changes, words) -> None:
    config = config_of(sharp, cached(caches["hidden"]))
    config["data"]["init_args"] |= changes
    message = refusal("fit", "--config", write(config, tmp_path / "run.yaml"))
    assert re.search(rf"model.teacher.init_args.path: the text of the item '\w+-\w+-\d+' .*({words})", message), message
