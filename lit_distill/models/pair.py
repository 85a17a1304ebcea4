"""A student and its teacher, loaded, cut to the tokens they share and, where the strategy says so, spread over the ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lit_distill.models.causal_lm import CausalLM, check_head
from lit_distill.models.lora import ADAPTER, LoraSpec, add_lora, fingerprint, keep_only_trained
from lit_distill.models.sharding import free_ends, shard
from lit_distill.models.spec import ModelSpec, is_quantized, load_model, load_tokenizer, open_model, stored_weights
from lit_distill.models.tensor_parallel import split_blocks
from lit_distill.models.vocabulary import common_vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lit_distill.parallel import Sharding

log = logging.getLogger(__name__)


def build_pair(
    student: ModelSpec,
    teacher: ModelSpec | None,
    tokenizer: PreTrainedTokenizerBase,
    sharding: Sharding | None = None,
) -> tuple[CausalLM, CausalLM | None]:
    """The student in float32, or as stored under adapters, and the teacher as stored, unless their specs say otherwise.

    A teacher that shares its weights with the student is the student.

    Args:
        student: key ``model.student``.
        teacher: key ``model.teacher``; None where nothing needs one.
        tokenizer: the student's.
        sharding: how both are spread over the ranks, all of which call this; None loads them whole.

    Raises:
        ValueError: if a model cannot be loaded, or the two do not share their tokens.
    """
    learner = _Loading(student, "model.student", torch.float32 if student.lora is None else None, sharding)
    if teacher is None:
        return learner.finish(None), None
    if teacher.shared_with_student:
        lm = learner.finish(None)
        return lm, lm
    expert = _Loading(teacher, "model.teacher", None, sharding)
    rows = [part.model.get_output_embeddings().weight.shape[0] for part in (learner, expert)]
    size = common_vocabulary_size(tokenizer, load_tokenizer(teacher, "model.teacher"), *rows)
    return learner.finish(size), expert.finish(size, frozen=True)


class _Loading:
    """A model on its way: its shapes are known, its weights may not have been read."""

    def __init__(self, spec: ModelSpec, key: str, dtype: torch.dtype | None, sharding: Sharding | None) -> None:
        self.spec = spec
        self.key = key
        self.sharding = sharding
        self.model: PreTrainedModel
        self.names: dict[str, str] | None = None
        with _drawn_by_the_seed():
            if sharding is None or (spec.lora is not None and spec.lora.use_dora):  # which measures the weights first
                self.model = load_model(spec, key, dtype)
            else:
                self.model, self.names = open_model(spec, key, dtype)
        if spec.lora is not None:
            self._add_lora(spec.lora)
        if sharding is None:
            return
        if is_quantized(spec, self.model.config):  # its integers are not sharded: each process keeps all of them
            if spec.lora is not None:
                raise ValueError(
                    f"{key}.path: {spec.path} in few bits cannot be cut into shards, and fsdp2 trains nothing else. Use "
                    "trainer.strategy: ddp, or a base that is not quantised."
                )
            self.sharding = None
        elif self.names is None:
            log.info("%s.path: each process loads the whole of %s before it is cut into shards.", key, spec.path)

    def _add_lora(self, lora: LoraSpec) -> None:
        stored = {id(p): (self.names or {}).get(name) for name, p in self.model.named_parameters()}
        with _drawn_by_the_seed():
            add_lora(self.model, lora, f"{self.key}.lora")
        if self.names is not None:  # parameters have other names now, and those that train whole are copies
            named = dict(self.model.named_parameters())
            originals = {name: name.replace(f"modules_to_save.{ADAPTER}", "original_module") for name in named}
            files = {name: stored.get(id(named[original])) for name, original in originals.items()}
            self.names = {name: file for name, file in files.items() if file is not None}

    def finish(self, vocabulary_size: int | None, frozen: bool = False) -> CausalLM:
        """Read, shard and check it."""
        sharding = self.sharding
        if sharding is None:
            lm = CausalLM(self.model, vocabulary_size, self.spec.compile)
            if self.model.device.type != "meta" and not is_quantized(self.spec, self.model.config):
                lm.to(torch.get_default_device())  # Lightning's: what was drawn or read on the processor follows
            device = self.model.device
        else:
            lm = CausalLM(self.model, vocabulary_size)
            device = self._spread(lm, sharding, frozen)
        if self.spec.lora is not None:
            keep_only_trained(lm)
        if device.type != "meta":
            check_head(lm, self.key, device)
            free_ends(lm)
        return lm

    def _spread(self, lm: CausalLM, sharding: Sharding, frozen: bool) -> torch.device:
        kind = sharding.mesh.device_type
        device = torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
        if frozen:
            lm.requires_grad_(False)
        if self.spec.lora is not None:
            lm.base_fingerprint = self._fingerprint()
        if sharding.tensor_mesh is not None:
            split_blocks(self.model, sharding.tensor_mesh, self.key)
        shard(lm, sharding, frozen, self.spec.compile)
        if self.names is not None:
            offload = sharding.offload_teacher if frozen else sharding.offload_student
            kept = torch.device("cpu") if offload else device
            stored_weights(self.spec, self.key).fill(self.model, self.names, kept, f"{self.key}.path: {self.spec.path}")
        return device

    def _fingerprint(self) -> int:
        if self.names is None:
            return fingerprint(self.model)
        names, weights = self.names, stored_weights(self.spec, self.key)
        return fingerprint(self.model, lambda name, positions: weights.numbers_at(names[name], positions))


@contextmanager
def _drawn_by_the_seed() -> Iterator[None]:
    """Let new weights depend on `seed_everything` alone, where it was called: not on earlier draws, nor on the strategy."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(int(seed))
        yield
