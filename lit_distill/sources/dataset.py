"""Source for SFT, KD and offline SeqKD: the responses in the dataset, which `predict` may have written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lit_distill.sources.base import TEXT_SIGNALS, RolloutContext, Source

if TYPE_CHECKING:
    from lit_distill.types import Batch, Sequences

_NO_RESPONSES = (
    "DatasetResponses trains on the responses in the data, but the data has no responses. "
    "Set data.init_args.responses: true, or choose a source that generates."
)


class DatasetResponses(Source):
    """The responses of the dataset; each batch is used for one optimiser step."""

    provides = TEXT_SIGNALS
    reads_prompts = False
    generates = False

    def check_trainer(self, trainer: Any) -> None:
        """Reject data without responses."""
        if not getattr(trainer.datamodule, "responses", True):
            raise ValueError(_NO_RESPONSES)

    def mini_batches(self, batch: Batch, context: RolloutContext) -> Iterator[Sequences]:
        """The batch itself."""
        if batch.sequences is None:
            raise ValueError(_NO_RESPONSES)
        yield batch.sequences
