"""Saves and restores the state that a checkpoint has in addition to Lightning's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_distill.distributed.stored import without_tensors
from lit_distill.models.record import check_same_adapters, student_metadata
from lit_distill.resume.changes import (
    Change,
    apply_changes,
    changes,
    changes_of_loss,
    check_changes,
    check_state,
    other_class,
    reset_optimizer_state,
    settings_of,
)
from lit_distill.resume.position import load_position, save_position
from lit_distill.resume.unfinished import UnfinishedPhase
from lit_distill.validation import check_same_model

if TYPE_CHECKING:
    from lit_distill.resume.run import ResumableRun

SETTINGS = "settings"


def save_run(run: ResumableRun, checkpoint: dict[str, Any]) -> None:
    """Add the state of a run to a checkpoint that is being saved; called on all ranks.

    Args:
        run: the run.
        checkpoint: changed in place; only plain values and tensors are added.
    """
    checkpoint["source"] = run.source.state_dict()
    for key, teacher in run.frozen_configs.items():
        checkpoint[key] = teacher.state_dict()
    checkpoint["student"] = student_metadata(run.student_spec, run.student)
    checkpoint[SETTINGS] = {
        **settings_of(run, _data_module(run), partial(scheduled_steps, run)),
        "source": type(run.source).__name__,
        "optimizer_since": run.optimizer_since,
        "reset_optimizer": _reset_requested(run.trainer),
    }
    if run.unfinished:
        checkpoint["phase"] = run.unfinished.state(run.data_ranks, **_batch_settings(run))
    save_position(run.trainer, checkpoint)


def check_continuation(run: ResumableRun, trainer: Any, path: Path) -> None:
    """Compare a checkpoint with the run that resumes it, before data and models are read.

    Raises:
        ValueError: with the key of a changed setting that cannot take effect.
    """
    if then := without_tensors(path).get(SETTINGS):
        now = settings_of(run, None, lambda: 1)
        check_changes(then, now, _resets_optimizer(trainer, then, now))


def load_run(run: ResumableRun, checkpoint: dict[str, Any]) -> None:
    """Restore what `save_run` has added, before Lightning reads its own part.

    Args:
        run: the run, with its models.
        checkpoint: changed in place; parts that an older version did not write may be missing.

    Raises:
        ValueError: with the key, if it has another student, or if a changed setting cannot take effect.
    """
    check_same_adapters(checkpoint.get("student", {}), run.student_spec.lora, run.student)
    check_same_model(checkpoint["state_dict"], run.state_dict())
    then = checkpoint.get(SETTINGS, {})
    same_source = then.get("source", type(run.source).__name__) == type(run.source).__name__
    run.source.load_state_dict(checkpoint.get("source", {}) if same_source else {})
    for key, teacher in run.frozen_configs.items():
        if checkpoint.get(key):
            teacher.load_state_dict(checkpoint[key])
    if run.trainer.state.fn == "fit":
        _load_optimizer(run, checkpoint, then)
        _load_phase(run, checkpoint)
        done, most = checkpoint["global_step"], run.trainer.max_steps
        if 0 <= most <= done:
            rank_zero_info(
                f"trainer.max_steps: {most}, and the checkpoint has {done} steps already. Nothing is left to train; set it higher "
                "to go on."
            )


def scheduled_steps(run: ResumableRun) -> int:
    """Optimiser steps of the learning-rate schedule: the whole run, or the rest of it since the optimiser was reset."""
    return run.total_steps() - run.optimizer_since


def _load_optimizer(run: ResumableRun, checkpoint: dict[str, Any], then: dict[str, Any]) -> None:
    run.optimizer_since = then.get("optimizer_since", 0)
    steps = partial(scheduled_steps, run)
    now = settings_of(run, _data_module(run), steps)
    resets = _resets_optimizer(run.trainer, then, now)
    if then:
        check_changes(then, now, resets)
    for change in changes_of_loss(then, now):
        _say(change)
    if resets:
        run.optimizer_since = checkpoint["global_step"]
        reset_optimizer_state(checkpoint, run, steps)
        rank_zero_info("checkpoint.reset_optimizer: a new optimiser and learning-rate schedule start here.")
        return
    if not checkpoint.get("optimizer_states"):
        raise ValueError(
            "ckpt_path: the checkpoint has weights but no optimiser state. Set checkpoint.reset_optimizer: true to continue "
            "from the weights with a new optimiser."
        )
    if not then:
        check_state(checkpoint["optimizer_states"][0]["param_groups"], run)
        return
    differences = list(changes(then, now))
    for change in differences:
        _say(change)
    if differences:
        apply_changes(checkpoint, run, steps)


def _say(change: Change) -> None:
    rank_zero_info(f"{change.key}: {change.before} in the checkpoint, {change.now} from now on.")


def _load_phase(run: ResumableRun, checkpoint: dict[str, Any]) -> None:
    run.unfinished = None
    if phase := checkpoint.get("phase"):
        run.unfinished = UnfinishedPhase.from_state(phase, run.data_ranks, **_batch_settings(run))
        if run.unfinished is None:
            rank_zero_warn(
                f"ckpt_path: max_steps ended the run after {phase['done']} of the {phase['steps']} optimiser steps of a batch. The "
                "remaining steps are skipped, because source, data.init_args.batch_size or the number of ranks has changed."
            )
    load_position(run.trainer, checkpoint, again=run.unfinished and run.unfinished.batches)


def _reset_requested(trainer: Any) -> bool:
    return any(getattr(callback, "reset_optimizer", False) for callback in trainer.checkpoint_callbacks)


def _resets_optimizer(trainer: Any, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether to reset the optimiser: if requested, and not done already by the checkpoint's run with the same classes."""
    done = then.get("reset_optimizer", False) and not other_class(then, now)
    return _reset_requested(trainer) and not done


def _batch_settings(run: ResumableRun) -> dict[str, Any]:
    """The settings that determine the items of a batch and its mini-batches."""
    return {
        "source": type(run.source).__name__,
        "batch_size": getattr(_data_module(run), "tokens_per_batch", None)
        or getattr(_data_module(run), "batch_size", None),
    }


def _data_module(run: ResumableRun) -> Any:
    return run.trainer.datamodule
