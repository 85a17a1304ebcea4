"""What a checkpoint holds beside what Lightning puts in it, and what a run that goes on makes of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_distill.changes import changes, check_changes, check_state, other_class, settings_of, start_afresh, take_effect
from lit_distill.checks import check_same_model
from lit_distill.models.record import check_same_adapters, student_record
from lit_distill.position import load_position, save_position
from lit_distill.rollouts import UnfinishedPhase
from lit_distill.runs import without_tensors

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

SETTINGS = "settings"


def save_run(module: DistillationModule, checkpoint: dict[str, Any]) -> None:
    """Add to a checkpoint that is being saved; called on all ranks.

    Args:
        module: of the run.
        checkpoint: changed in place; what is added is plain values and tensors.
    """
    checkpoint["source"] = module.source.state_dict()
    checkpoint["student"] = student_record(module.student_spec, module.student)
    checkpoint[SETTINGS] = {
        **settings_of(module, _data_module(module), partial(scheduled_steps, module)),
        "source": type(module.source).__name__,
        "optimizer_since": module.optimizer_since,
        "reset_optimizer": _wants_fresh_optimizer(module.trainer),
    }
    if module.unfinished:
        checkpoint["phase"] = module.unfinished.state(module.data_ranks, **_made_by(module))
    save_position(module.trainer, checkpoint)


def check_continuation(module: DistillationModule, trainer: Any, path: Path) -> None:
    """Compare a checkpoint with a run that is to go on from it, before data and models are read.

    Raises:
        ValueError: naming the key that cannot take effect.
    """
    if then := without_tensors(path).get(SETTINGS):
        now = settings_of(module, None, lambda: 1)
        check_changes(then, now, _starts_afresh(trainer, then, now))


def load_run(module: DistillationModule, checkpoint: dict[str, Any]) -> None:
    """Take up what `save_run` has added, before Lightning reads its own part.

    Args:
        module: of the run, with its models.
        checkpoint: changed in place; also one that is older than some of this.

    Raises:
        ValueError: naming the key, if it is of another student, or of other settings than can take effect.
    """
    check_same_adapters(checkpoint.get("student", {}), module.student_spec.lora, module.student)
    check_same_model(checkpoint["state_dict"], module.state_dict())
    then = checkpoint.get(SETTINGS, {})
    same_source = then.get("source", type(module.source).__name__) == type(module.source).__name__
    module.source.load_state_dict(checkpoint.get("source", {}) if same_source else {})
    if module.trainer.state.fn == "fit":
        _load_optimizer(module, checkpoint, then)
        _load_phase(module, checkpoint)


def scheduled_steps(module: DistillationModule) -> int:
    """Optimiser steps of the learning-rate schedule: of the whole run, or of what is left since the optimiser began afresh."""
    return module.total_steps() - module.optimizer_since


def _load_optimizer(module: DistillationModule, checkpoint: dict[str, Any], then: dict[str, Any]) -> None:
    module.optimizer_since = then.get("optimizer_since", 0)
    steps = partial(scheduled_steps, module)
    now = settings_of(module, _data_module(module), steps)
    afresh = _starts_afresh(module.trainer, then, now)
    if then:
        check_changes(then, now, afresh)
    if afresh:
        module.optimizer_since = checkpoint["global_step"]
        start_afresh(checkpoint, module, steps)
        rank_zero_info("checkpoint.reset_optimizer: optimiser and learning-rate schedule start afresh.")
        return
    if not checkpoint.get("optimizer_states"):
        raise ValueError(
            "ckpt_path: the checkpoint holds weights without an optimiser's state. Set checkpoint.reset_optimizer: true to go on "
            "from them with a fresh one."
        )
    if not then:
        check_state(checkpoint["optimizer_states"][0]["param_groups"], module)
        return
    differences = list(changes(then, now))
    for change in differences:
        rank_zero_info(f"{change.key}: {change.before} in the checkpoint, {change.now} from here on.")
    if differences:
        take_effect(checkpoint, module, steps)


def _load_phase(module: DistillationModule, checkpoint: dict[str, Any]) -> None:
    module.unfinished = None
    if phase := checkpoint.get("phase"):
        module.unfinished = UnfinishedPhase.from_state(phase, module.data_ranks, **_made_by(module))
        if module.unfinished is None:
            rank_zero_warn(
                f"ckpt_path: max_steps ended the run after {phase['done']} of the {phase['steps']} optimiser steps of a batch. The "
                "others are left out, since source, data.init_args.batch_size or the number of ranks is another one now."
            )
    load_position(module.trainer, checkpoint, again=module.unfinished and module.unfinished.batches)


def _wants_fresh_optimizer(trainer: Any) -> bool:
    return any(getattr(callback, "reset_optimizer", False) for callback in trainer.checkpoint_callbacks)


def _starts_afresh(trainer: Any, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """If asked for, once: not where the checkpoint is of a run that has done so with the same classes."""
    done = then.get("reset_optimizer", False) and not other_class(then, now)
    return _wants_fresh_optimizer(trainer) and not done


def _made_by(module: DistillationModule) -> dict[str, Any]:
    """What decides about the items of a batch and of its mini-batches."""
    return {
        "source": type(module.source).__name__,
        "batch_size": getattr(_data_module(module), "batch_size", None),
    }


def _data_module(module: DistillationModule) -> Any:
    return module.trainer.datamodule  # type: ignore[attr-defined]
