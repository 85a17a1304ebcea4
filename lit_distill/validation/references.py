"""Checks, before anything loads, that rewards and checkers can read the references of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_distill.evaluation.checkers import check_item
from lit_distill.types import every_error_of
from lit_distill.validation.context_length import SPLITS, answers_prompts

if TYPE_CHECKING:
    from lit_distill.validation.run import DistillationRun


def check_references(run: DistillationRun, stage: str) -> None:
    """Refuse references that a reward of the source, or the checker of a callback, cannot read.

    Args:
        run: the run; nothing is checked if its data module has no method ``references``.
        stage: fit, validate, test or predict.

    Raises:
        ArgumentError: of the checker, naming the item.
    """
    data: Any = run.trainer.datamodule
    if stage == "predict" or not hasattr(data, "references"):
        return
    if stage == "fit" and run.source.rewards:
        for item, references in data.references("train"):
            for reward in run.source.rewards.values():
                with every_error_of(reward):
                    reward.check(item, references)
    for callback in run.trainer.callbacks:
        checker = getattr(callback, "checker", None)
        if checker is None or not answers_prompts(callback, stage):
            continue
        for item, references in data.references(SPLITS[stage][-1]):
            if references:
                check_item(checker, references, item)
