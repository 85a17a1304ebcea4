"""What a callback monitors is known at the start: a metric that is never logged, or not in time, is refused with its key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input.conftest import Refusal, changed, mixed, refusal
from command_line import run, tiny_config, write
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from training import learner_of, quiet_trainer

from lit_distill.callbacks import (
    CalibrationMonitor,
    ExposureBiasMonitor,
    GenerationEvaluator,
    ObjectiveWeightSchedule,
    OnPolicyEvaluator,
    RolloutMonitor,
    RunCheckpoint,
    TeacherMixSchedule,
)
from lit_distill.data import ProceduralData
from lit_distill.evaluation.checkers import ExactMatch
from lit_distill.evaluation.verbalizer import Verbalizer
from lit_distill.objectives import DirectPreference, ForwardKL, NextToken, PolicyGradient, ReverseKL
from lit_distill.sources import ReplayRollouts, ResponsePairs, StudentRollouts, TeacherMixedRollouts
from lit_distill.validation import logged_metrics

__all__ = ["refusal"]
PAIRS = {"max_new_tokens": 4, "mini_batch_size": 4, "inner_epochs": 1}
METHODS: dict[str, tuple[dict[str, Any], Any, list[Callback]]] = {
    "kd": ({"kd": ForwardKL(), "ce": NextToken(weight=0.5)}, None, []),
    "minillm": (
        {"long": PolicyGradient(), "single": ReverseKL()},
        lambda: TeacherMixedRollouts(**PAIRS),
        [TeacherMixSchedule(), ObjectiveWeightSchedule("single", end=0.5)],
    ),
    "dpkd": ({"dpkd": DirectPreference()}, lambda: ResponsePairs(**PAIRS), []),
    "gkd": ({"kd": ReverseKL()}, lambda: StudentRollouts(max_new_tokens=4), []),
    "distillm": ({"kd": ForwardKL()}, lambda: ReplayRollouts(1.0, capacity=8, max_new_tokens=4), []),
}
SELDOM = {"train/skipped_steps"}


@pytest.fixture
def task(tmp_path) -> Verbalizer:
    lines = [
        json.dumps({"text": text, "label": index % 2}) for index, text in enumerate(["well", "bad", "so so", "great"])
    ]
    (tmp_path / "mood.jsonl").write_text("\n".join(lines))
    return Verbalizer(str(tmp_path / "mood.jsonl"), template="Say: {text}\nMood:", words=[" sad", " glad"])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_metrics_that_are_said_to_be_logged_are_those_that_are(pair, tmp_path, task, method: str) -> None:
    class Ask(Callback):
        def metric_names(self, trainer, pl_module) -> list[str]:
            return []

        def on_train_start(self, trainer, pl_module) -> None:
            self.logged = logged_metrics(pl_module)

    objectives, source, more = METHODS[method]
    ask = Ask()
    callbacks = [
        ask,
        GenerationEvaluator(max_prompts=-1, max_new_tokens=12, checker=ExactMatch()),
        CalibrationMonitor(tasks={"mood": task}, every_n_validations=1),
        ExposureBiasMonitor(max_prompts=2, num_samples=1, max_new_tokens=4, lengths=[1], every_n_validations=1),
        OnPolicyEvaluator(max_prompts=2, num_responses=2, max_new_tokens=4),
        RolloutMonitor(num_samples=0),
        LearningRateMonitor(),
        *more,
    ]
    learner = learner_of(pair, objectives, source and source())
    quiet = {"limit_val_batches": 1.0, "val_check_interval": 1.0, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(tmp_path, max_steps=2, logger=True, callbacks=callbacks, **quiet)
    trainer.fit(learner, ProceduralData(num_train=8, num_validation=4, num_test=2, batch_size=4, eval_batch_size=2))
    seen = set(trainer.callback_metrics)
    assert not {name for name in seen if name not in ask.logged}
    assert ask.logged.names - seen <= SELDOM
    assert ask.logged.complete


def stopping(monitor: str, **arguments: Any) -> dict[str, Any]:
    init_args = {"monitor": monitor, **arguments}
    return {"trainer.callbacks": [{"class_path": "EarlyStopping", "init_args": init_args}]}


STOPPING = r"trainer\.callbacks: EarlyStopping\.monitor: "
EPOCHS = {"trainer.max_steps": -1, "trainer.max_epochs": 3, "trainer.val_check_interval": 1.0}  # of 6 batches
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a slip": (stopping("val/los"), STOPPING + r"val/los is not logged in this run\. Did you mean val/loss\?"),
    "a slip of the checkpoint": ({"checkpoint.monitor": "val/los"}, r"checkpoint\.monitor: val/los .*mean val/loss\?"),
    "nothing like it": (
        stopping("val/nothing"),
        STOPPING + r"val/nothing is not logged.*Metrics of this run: loss, .*val/perplexity",
    ),
    "a metric that is off": (
        {**stopping("val/rouge_l"), "generation.max_prompts": 0},
        STOPPING + r"val/rouge_l .*Set generation\.max_prompts\.",
    ),
    "a calibration that is off": (
        {**stopping("val/ece"), "calibration.next_token": False},
        STOPPING + r"val/ece .*Set calibration\.next_token: true\.",
    ),
    "a judge that is not there": (stopping("val/judge_ratio"), r"val/judge_ratio .*callback Judge"),
    "an exposure bias that is off": (stopping("val/ex_acc_err_8"), r"exposure_bias\.every_n_validations"),
    "sampled responses that are off": (stopping("val/pass_at_8"), r"val/pass_at_8 .*Set on_policy\.max_prompts; "),
    "a k that is not computed": (
        {**stopping("val/pass_at_7"), "on_policy.max_prompts": 2},
        r"val/pass_at_7 .*on_policy\.k has the k of pass_at_<k>",
    ),
    "a slip in sampled responses": (
        {"checkpoint.monitor": "val/pass_at8", "on_policy.max_prompts": 2},
        r"checkpoint\.monitor: val/pass_at8 .*mean val/pass_at_8\?",
    ),
    "an overlap with nobody": (
        {
            **stopping("val/top_k_overlap"),
            "on_policy.max_prompts": 2,
            "model.teacher": None,
            "model.objectives": {"ce": "NextToken"},
        },
        r"val/top_k_overlap .*model\.teacher to one that answers for all tokens of generated texts",
    ),
    "answers that nobody checks": (stopping("val/answer_accuracy"), r"val/answer_accuracy .*generation\.checker\."),
    "a teacher that is not there": (
        {**stopping("val/reverse_kl"), "model.teacher": None, "model.objectives": {"ce": "NextToken"}},
        r"val/reverse_kl .*Set model\.teacher\.path\.",
    ),
    "rollouts of a dataset": (
        stopping("rollout/unfinished"),
        r"rollout/unfinished .*model\.source to one that generates",
    ),
    "a reward that nobody gives": (
        {**stopping("rollout/reward"), "model.source": {"class_path": "StudentRollouts"}},
        r"rollout/reward is not logged.*model\.source to one that scores",
    ),
    "a slip in a rollout": (
        {**stopping("rollout/unfinishd"), "model.source": {"class_path": "StudentRollouts"}},
        r"mean rollout/unfinished\?",
    ),
    "a test in a fit": (stopping("test/loss"), r"test/loss .*a metric under val/"),
    "a term that an objective has not": (stopping("train/kd/accuracy"), r"train/kd/accuracy is not logged"),
    "no validation": ({**stopping("val/loss"), "trainer.limit_val_batches": 0}, STOPPING + r".*there is no validation"),
    "no validation, written": (
        {"checkpoint.monitor": "val/loss", "trainer.limit_val_batches": 0},
        r"checkpoint\.monitor: val/loss is monitored, but there is no validation",
    ),
    "a run that ends before": (
        {**stopping("val/loss"), **EPOCHS, "trainer.max_steps": 5},
        r"read at the end of the first epoch, after batch 5; the first validation comes after batch 6",
    ),
    "an epoch without validation": (
        {**stopping("val/loss", check_on_train_epoch_end=True), **EPOCHS, "trainer.check_val_every_n_epoch": 2},
        r"after batch 6; the first validation comes after batch 12",
    ),
}
ACCEPTED: dict[str, dict[str, Any]] = {
    "of a validation": stopping("val/loss"),
    "of an objective in validation": stopping("val/kd"),
    "of generation": stopping("val/rouge_l"),
    "of checked answers": {**stopping("val/answer_accuracy"), "generation.checker": "ExactMatch"},
    "of sampled responses": {"checkpoint.monitor": "val/pass_at_8", "on_policy.max_prompts": 2},
    "of their overlap": {**stopping("val/top_k_overlap"), "on_policy.max_prompts": 2},
    "of calibration": {**stopping("val/teacher_ece"), "calibration.next_token": True},
    "of training": {**stopping("train/kd"), **EPOCHS},
    "of an objective": {
        **stopping("train/dpkd/accuracy"),
        "model.source": {"class_path": "ResponsePairs", "init_args": PAIRS},
        "model.objectives": {"dpkd": "DirectPreference"},
    },
    "of rollouts": {**stopping("rollout/reverse_kl_k1"), **mixed()},
    "not strict": stopping("val/nothing", strict=False),
    "the step": {"checkpoint.monitor": "step", "checkpoint.mode": "max"},
    "a validation of every second epoch": {**stopping("val/loss"), **EPOCHS, "trainer.check_val_every_n_epoch": 2},
    "the last batch": {**stopping("val/loss"), **EPOCHS, "trainer.max_steps": 6},
    "one batch": {**stopping("val/loss"), "trainer.fast_dev_run": True},
    "no validation before the end": {**stopping("val/loss"), "trainer.val_check_interval": 5},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_metric_that_never_comes_is_refused_before_any_weights_load(refusal: Refusal, case: str) -> None:
    changes, words = REFUSED[case]
    message = refusal(changes)
    assert re.search(words, message, re.DOTALL), message


@pytest.mark.slow
@pytest.mark.parametrize("case", ACCEPTED)
def test_a_metric_that_comes_is_not_refused(refusal: Refusal, case: str) -> None:
    with pytest.raises(AssertionError, match="models were loaded"):
        refusal(ACCEPTED[case])


def test_a_callback_of_your_own_may_log_what_it_likes(pair, tmp_path) -> None:
    class Mine(Callback):
        def on_train_batch_end(self, trainer, pl_module, *arguments) -> None:
            pl_module.log_step_metrics({"mine/length": torch.tensor(1.0)})

    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[Mine(), EarlyStopping("mine/length")])
    data = ProceduralData(num_train=8, num_validation=4, num_test=2, batch_size=4)
    trainer.fit(learner_of(pair, {"kd": ForwardKL()}), data)
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer.limit_val_batches": 0},
        {
            "model.source": {"class_path": "ResponsePairs", "init_args": PAIRS},
            "model.objectives": {"dpkd": "DirectPreference"},
        },
    ],
    ids=["no validation", "nothing that a dataset can feed"],
)
def test_where_nobody_logs_the_loss_the_default_watches_nothing_and_says_so(
    pair, tmp_path, monkeypatch, caplog, changes: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = {"generation.max_prompts": 0, "trainer.max_steps": 2, **changes}
    config = write(changed(tiny_config(pair), quick), tmp_path / "c.yaml")
    with caplog.at_level("INFO"):
        run("fit", "--config", config)
    said = [record.getMessage() for record in caplog.records if "checkpoint.monitor" in record.getMessage()]
    assert said == ["checkpoint.monitor: val/loss is not logged, so there is no best checkpoint; `last` is exported."]
    folder = Path("runs/c/version_0")
    assert [file.name for file in folder.glob("checkpoints/*")] == ["last.ckpt"]
    assert [file.name for file in folder.glob("export/*")] == ["last"]
    assert run("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", 3).trainer.global_step == 3


def test_with_a_validation_the_default_watches_the_loss_under_the_name_that_older_checkpoints_have(
    pair, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = {"generation.max_prompts": 0, "trainer.max_steps": 2, "export.enabled": False}
    cli = run("fit", "--config", write(changed(tiny_config(pair), quick), tmp_path / "c.yaml"))
    checkpoint = cli.trainer.checkpoint_callback
    assert checkpoint.monitor == "val/loss"
    assert checkpoint.best_model_path
    assert (
        checkpoint.state_key == RunCheckpoint(monitor="val/loss").state_key == RunCheckpoint(monitor="auto").state_key
    )
