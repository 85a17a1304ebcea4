"""A local model as the teacher: frozen, in evaluation mode and its own dtype; not part of checkpoints or the optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.models import ModelSpec, common_vocabulary_size, load_tokenizer, validate_specs
from lit_distill.models.build import ModelBuilder
from lit_distill.models.fsdp import clear_forward_order, is_sharded
from lit_distill.models.identity import identity_of
from lit_distill.models.lm_head import LMHead, label_logprobs
from lit_distill.models.lora import adapter_layers, adapters_disabled
from lit_distill.models.precision import forward_only
from lit_distill.models.roles import check_graphs, resolve_dtype, warn_of_emulation
from lit_distill.teachers.base import Opening, Teacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache

    from lit_distill.models import CausalLM
    from lit_distill.types import Sequences


class HiddenRows(NamedTuple):
    """`TeacherRows` from hidden states: exact, and logits are computed only for the requested rows."""

    hidden: Tensor
    """[N, H]."""
    head: LMHead

    def logits(self, rows: slice) -> Tensor:
        """See `TeacherRows`."""
        return self.head.logits(self.hidden[rows])

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        """See `TeacherRows`."""
        return label_logprobs(self.head, self.hidden, labels, chunk_rows)


class FrozenTeacher:
    """A causal language model that is never trained.

    It is deliberately not an `nn.Module`: so Lightning does not save, optimise or broadcast it with the module that owns it, and
    does not set it to training mode or convert its dtype.

    Args:
        lm: the model; it is set to evaluation mode and its parameters stop requiring gradients, unless ``shared``.
        shared: whether ``lm`` is the student. Its adapters are then disabled whenever the teacher runs.
    """

    def __init__(self, lm: CausalLM, shared: bool = False) -> None:
        self.lm = lm if shared else lm.eval().requires_grad_(False)
        self.shared = shared
        self._adapters = adapter_layers(lm) if shared else []

    @contextmanager
    def _frozen_mode(self, device_type: str) -> Iterator[None]:
        """Evaluation mode, with all attention kernels; if the weights are the student's, also with its adapters disabled."""
        eval_mode = self.lm.eval_mode() if self.lm.training else nullcontext()
        with eval_mode, adapters_disabled(self._adapters), forward_only(device_type):
            yield

    def _move_to(self, device: torch.device) -> None:
        """Move the model to the device of its inputs, since Lightning moves only registered modules."""
        if not is_sharded(self.lm) and next(self.lm.parameters()).device != device:
            self.lm.to(device)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[B, S, H]`` in the teacher's own dtype, not the trainer's precision; see `CausalLM.forward`."""
        self._move_to(input_ids.device)
        with torch.autocast(input_ids.device.type, enabled=False), self._frozen_mode(input_ids.device.type):
            hidden: Tensor = self.lm(input_ids, attention_mask, cache, position_ids)
        clear_forward_order(self.lm)
        return hidden

    def rows(self, sequences: Sequences) -> HiddenRows:
        """The rows of all targets; hidden states that were recorded in a rollout are reused."""
        recorded = sequences.teacher_hidden
        if recorded is None:
            hidden = self.target_rows(
                sequences
            )  # before head(), since this moves the teacher to the device of the texts
            return HiddenRows(hidden, self.head())
        rows = recorded.flatten(0, 1)[sequences.recorded_index(recorded)]
        return HiddenRows(rows.to(sequences.input_ids.device), self.head())

    @torch.no_grad()
    def target_rows(self, sequences: Sequences) -> Tensor:
        """Hidden rows ``[N, H]`` for the N targets."""
        self._move_to(sequences.input_ids.device)
        device_type = sequences.input_ids.device.type
        with torch.autocast(device_type, enabled=False), self._frozen_mode(device_type):
            rows = self.lm.target_rows(sequences)
        clear_forward_order(self.lm)
        return rows

    def head(self) -> LMHead:
        """The teacher's LM head over the common vocabulary, in its own dtype, or in float32 if the device emulates that dtype."""
        with adapters_disabled(self._adapters):
            return self.lm.head().for_products()

    decoding_head = head

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.lm.config

    @property
    def tensor_parallel_group(self) -> ProcessGroup | None:
        """See `CausalLM`."""
        return self.lm.tensor_parallel_group

    @property
    def cuda_graphs(self) -> bool:
        """See `CausalLM`."""
        return self.lm.cuda_graphs

    @property
    def forward_is_collective(self) -> bool:
        """See `CausalLM`."""
        return self.lm.forward_is_collective

    @contextmanager
    def transformers_model(self, device: torch.device) -> Iterator[PreTrainedModel]:
        """The model itself in generation mode and its own dtype, for code of transformers that generates."""
        self._move_to(device)
        unmixed = torch.autocast(device.type, enabled=False)
        with unmixed, self._frozen_mode(device.type), self.lm.transformers_model(device) as model:
            yield model

    def generation_mode(self) -> AbstractContextManager[None]:
        """See `CausalLM`."""
        return self.lm.generation_mode()


class LocalTeacher(Teacher):
    """A causal language model in this process. In YAML its ``class_path`` is left out: ``teacher: {path: ...}``.

    Args:
        spec: the model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._builder: ModelBuilder | None = None
        self._opening: Opening | None = None
        self._key = ""

    def open(self, opening: Opening, key: str) -> int | None:
        """See `Teacher`; the weights are the student's if it is shared."""
        validate_specs(opening.student, self.spec, key)
        self.spec = resolve_dtype(self.spec, key, opening.device_type)
        check_graphs({key: self.spec}, opening.device_type, opening.sharding is not None)
        self._opening, self._key = opening, key
        if self.spec.shared_with_student:
            return None
        self._builder = ModelBuilder(self.spec, key, None, opening.sharding)
        rows = self._builder.model.get_output_embeddings().weight.shape[0]
        own = load_tokenizer(self.spec, key)
        return common_vocabulary_size(opening.tokenizer, own, opening.student_rows, rows, key)

    def load(self, vocabulary_size: int | None, student: CausalLM | None) -> FrozenTeacher:
        """See `Teacher`."""
        if self.spec.shared_with_student:
            assert student is not None
            return FrozenTeacher(student, shared=True)
        assert self._builder is not None
        assert self._opening is not None
        lm = self._builder.finish(vocabulary_size, self._opening.padding_free, frozen=True)
        self._builder = None
        warn_of_emulation(lm, self._key, self._opening.device_type)
        return FrozenTeacher(lm)

    def identity(self, key: str) -> dict[str, Any]:
        """The identity of the model."""
        return identity_of(self.spec, key)

    @property
    def description(self) -> str:
        """The model's path."""
        return self.spec.path


def as_teacher(given: Teacher | ModelSpec) -> Teacher:
    """The teacher that YAML describes: a class, or the settings of a local model."""
    return LocalTeacher(given) if isinstance(given, ModelSpec) else given
