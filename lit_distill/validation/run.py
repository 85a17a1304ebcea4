"""What validation needs of a run: the part of `DistillationModule` that exists before any weights load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lit_distill.distributed import DataRanks
    from lit_distill.generation import Prediction
    from lit_distill.models import ModelSpec
    from lit_distill.objectives import Objective
    from lit_distill.sources import Source
    from lit_distill.teachers import Teacher


class DistillationRun(Protocol):
    """A module with its Trainer attached."""

    trainer: Any
    student_spec: ModelSpec
    frozen_configs: Mapping[str, Teacher]
    source: Source
    objectives: Mapping[str, Objective]
    corpus_objectives: Mapping[str, Objective]
    optimizer_factory: Callable[[Any], Any]
    lr_scheduler_factory: Callable[[Any], Any] | None
    prediction: Prediction

    @property
    def teacher_config(self) -> Teacher | None:
        """The teacher as configured."""
        ...

    @property
    def teacher_spec(self) -> ModelSpec | None:
        """The teacher's model, if it is a local one that sees the student's texts."""
        ...

    @property
    def model_specs(self) -> dict[str, ModelSpec]:
        """All local models by their YAML key below ``model``."""
        ...

    @property
    def all_objectives(self) -> dict[str, Objective]:
        """Objectives on the source's text and on the corpus, by name."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, which also tokenizes the data."""
        ...

    @property
    def data_ranks(self) -> DataRanks:
        """Which part of every batch this rank has."""
        ...
