"""Every callback of Lightning does what it says, or is refused in one message with what to use instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch.callbacks as lightning
import pytest
from training import learner_of, quiet_trainer

from lit_distill.data import ProceduralData
from lit_distill.objectives import ForwardKL

BAR = {"enable_progress_bar": True}
# class -> how to make it, and what the Trainer needs for it
WORKS: dict[str, tuple[Callable[..., lightning.Callback], dict[str, Any]]] = {
    "BasePredictionWriter": (lightning.BasePredictionWriter, {}),
    "Callback": (lightning.Callback, {}),
    "Checkpoint": (lightning.Checkpoint, {"enable_checkpointing": True}),
    "DeviceStatsMonitor": (lambda: lightning.DeviceStatsMonitor(cpu_stats=True), {"logger": True}),
    "EarlyStopping": (lambda: lightning.EarlyStopping("val/loss"), {}),
    "LambdaCallback": (lightning.LambdaCallback, {}),
    "LearningRateMonitor": (lightning.LearningRateMonitor, {"logger": True}),
    "ModelCheckpoint": (lambda: lightning.ModelCheckpoint(monitor="val/loss"), {"enable_checkpointing": True}),
    "ModelSummary": (lightning.ModelSummary, {"enable_model_summary": True}),
    "ProgressBar": (lightning.ProgressBar, BAR),
    "RichModelSummary": (lightning.RichModelSummary, {"enable_model_summary": True}),
    "RichProgressBar": (lightning.RichProgressBar, BAR),
    "TQDMProgressBar": (lightning.TQDMProgressBar, BAR),
    "ThroughputMonitor": (lambda: lightning.ThroughputMonitor(len), {"logger": True}),
    "Timer": (lambda: lightning.Timer(timedelta(minutes=10)), {}),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "BackboneFinetuning": ({}, r"BackboneFinetuning freezes layers .*model\.student\.lora"),
    "BaseFinetuning": ({}, r"BaseFinetuning freezes layers .*model\.student\.lora"),
    "BatchSizeFinder": ({}, r"BatchSizeFinder .*model\.micro_batch_size"),
    "EMAWeightAveraging": ({}, r"EMAWeightAveraging copies the teacher too.*tools/export_student\.py"),
    "GradientAccumulationScheduler": (
        {"scheduling": {0: 2}},
        r"GradientAccumulationScheduler .*data\.init_args\.batch_size .*model\.micro_batch_size",
    ),
    "LearningRateFinder": ({}, r"LearningRateFinder .*model\.optimizer\.lr"),
    "ModelPruning": ({"pruning_fn": "l1_unstructured"}, r"ModelPruning .*model\.student\.keep_layers"),
    "OnExceptionCheckpoint": ({"dirpath": "x"}, r"OnExceptionCheckpoint .*`last`"),
    "SpikeDetection": ({}, r"SpikeDetection .*model\.on_nonfinite: skip"),
    "StochasticWeightAveraging": ({"swa_lrs": 0.1}, r"StochasticWeightAveraging .*checkpoint\.save_top_k: -1"),
    "WeightAveraging": ({}, r"WeightAveraging copies the teacher too"),
}


def test_somebody_has_decided_about_every_callback_of_this_lightning() -> None:
    undecided = set(lightning.__all__) ^ (WORKS.keys() | REFUSED.keys())
    assert not undecided, f"decide about it: {sorted(undecided)} of Lightning's callbacks is new or gone"


def fit(pair, folder, callback: lightning.Callback, **settings: Any):
    trainer = quiet_trainer(
        folder, max_steps=2, **{"limit_val_batches": 1.0, "val_check_interval": 1, **settings}, callbacks=[callback]
    )
    data = ProceduralData(num_train=8, num_validation=4, num_test=2, batch_size=4, eval_batch_size=2)
    trainer.fit(learner_of(pair, {"kd": ForwardKL()}), data)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_a_callback_works(pair, tmp_path, name: str) -> None:
    make, settings = WORKS[name]
    assert fit(pair, tmp_path, make(), **settings).global_step == 2


@pytest.mark.parametrize("name", REFUSED)
def test_a_callback_is_refused_with_its_key_and_what_to_use(refusal, name: str) -> None:
    arguments, words = REFUSED[name]
    message = refusal({"trainer.callbacks": [{"class_path": name, "init_args": arguments}]})
    assert re.search(rf"trainer\.callbacks: {words}", message, re.DOTALL), message


@pytest.mark.parametrize("duration", ["00:00:10:00", {"minutes": 10}])
def test_a_default_that_yaml_cannot_hold_is_written_as_its_text(refusal, duration) -> None:
    timer = {"trainer.callbacks": [{"class_path": "Timer", "init_args": {"duration": duration}}]}
    with pytest.raises(AssertionError, match="models were loaded"):
        refusal(timer)


def test_one_of_your_own_that_inherits_from_it_is_refused_as_well(pair, tmp_path) -> None:
    class Mine(lightning.GradientAccumulationScheduler):
        pass

    with pytest.raises(ValueError, match=r"trainer\.callbacks: Mine would average"):
        fit(pair, tmp_path, Mine({0: 2}))
