"""What a checkpoint holds beside what Lightning puts in it, and what a run that goes on makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_distill.checks import check_same_model
from lit_distill.models.record import check_same_adapters, student_record
from lit_distill.position import load_position, save_position
from lit_distill.rollouts import UnfinishedPhase

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule


def save_run(module: DistillationModule, checkpoint: dict[str, Any]) -> None:
    """Add to a checkpoint that is being saved; called on all ranks.

    Args:
        module: of the run.
        checkpoint: changed in place; what is added is plain values and tensors.
    """
    checkpoint["source"] = module.source.state_dict()
    checkpoint["student"] = student_record(module.student_spec, module.student)
    if module.unfinished:
        checkpoint["phase"] = module.unfinished.state(module.data_ranks, **_made_by(module))
    save_position(module.trainer, checkpoint)


def load_run(module: DistillationModule, checkpoint: dict[str, Any]) -> None:
    """Take up what `save_run` has added, before Lightning reads its own part.

    Args:
        module: of the run, with its models.
        checkpoint: changed in place; also one that is older than some of this.

    Raises:
        ValueError: naming the key, if it is of another student.
    """
    check_same_adapters(checkpoint.get("student", {}), module.student_spec.lora, module.student)
    check_same_model(checkpoint["state_dict"], module.state_dict())
    module.source.load_state_dict(checkpoint.get("source", {}))
    module.unfinished = None
    if phase := checkpoint.get("phase"):
        module.unfinished = UnfinishedPhase.from_state(phase, module.data_ranks, **_made_by(module))
        if module.unfinished is None:
            rank_zero_warn(
                f"ckpt_path: max_steps ended the run after {phase['done']} of the {phase['steps']} optimiser steps of a batch. The "
                "others are left out, since source, data.init_args.batch_size or the number of ranks is another one now."
            )
    load_position(module.trainer, checkpoint, again=module.unfinished and module.unfinished.batches)


def _made_by(module: DistillationModule) -> dict[str, Any]:
    """What decides about the items of a batch and of its mini-batches."""
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    return {"source": type(module.source).__name__, "batch_size": getattr(data, "batch_size", None)}
