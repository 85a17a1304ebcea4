"""Checkpoints fall where users expect them, although one batch may be many optimiser steps."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.callbacks import RunCheckpoint
from lit_distill.data import ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import PolicyGradient, ReverseKL
from lit_distill.sources import TeacherMixedRollouts


def minillm(
    pair: tuple[Path, Path], folder: Path, checkpoint: ModelCheckpoint, steps: int = 9, **trainer_settings
) -> L.Trainer:
    """Phases of three optimiser steps."""
    student, teacher = pair
    learner = DistillationModule(
        ModelSpec(str(student)),
        {"long": PolicyGradient(), "single": ReverseKL()},
        ModelSpec(str(teacher)),
        TeacherMixedRollouts(max_new_tokens=4, mini_batch_size=4, inner_epochs=3),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"limit_val_batches": 0, **trainer_settings},
    )
    trainer.fit(learner, ProceduralData(num_train=16, num_validation=4, num_test=4, batch_size=4))
    return trainer


def steps_of(folder: Path) -> list[int]:
    return sorted(torch.load(file, weights_only=True)["global_step"] for file in folder.glob("step*.ckpt"))


def test_every_n_steps_saves_at_the_end_of_the_phase_in_which_a_multiple_was_passed(pair, tmp_path) -> None:
    checkpoint = RunCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    minillm(pair, tmp_path, checkpoint, steps=12)
    assert steps_of(tmp_path) == [6, 9, 12]  # 4, 8 and 12 were passed there; no phase ends at 4 or 8


@pytest.mark.parametrize(("interval", "steps"), [(timedelta(0), [3, 6, 9]), (timedelta(hours=1), [])])
def test_a_time_interval_saves_at_the_end_of_the_batch_at_which_it_is_over(pair, tmp_path, interval, steps) -> None:
    minillm(pair, tmp_path, RunCheckpoint(tmp_path, filename="{step}", train_time_interval=interval, save_top_k=-1))
    assert steps_of(tmp_path) == steps


def test_last_is_the_state_at_the_end_even_where_the_best_is_earlier(pair, tmp_path) -> None:
    checkpoint = RunCheckpoint(tmp_path, monitor="val/reverse_kl", mode="max", save_last=True, filename="best")
    settings = {
        "limit_val_batches": 1.0,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
    }
    trainer = minillm(pair, tmp_path, checkpoint, **settings)
    best, last = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert last["global_step"] == trainer.global_step == 9
    assert best["global_step"] < 9  # the reverse KL falls, and its largest value is watched


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        *dict.fromkeys(
            ("val/exact_match", "val/pass_at_8", "val/answer_accuracy", "val/sst2/accuracy", "rollout/reward"), "max"
        ).items(),
        *dict.fromkeys(("val/loss", "val/reverse_kl", "val/sampled_unfinished", "val/my_score"), "min").items(),
    ],
)
def test_the_best_value_is_the_highest_where_more_is_better(tmp_path, monitor, mode) -> None:
    assert RunCheckpoint(tmp_path, monitor=monitor, mode="auto").mode == mode
    assert RunCheckpoint(tmp_path, monitor=monitor, mode="max").mode == "max"


def test_lightnings_own_modulo_is_refused_with_what_to_use(pair, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.callbacks: ModelCheckpoint .* RunCheckpoint"):
        minillm(pair, tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=4))
