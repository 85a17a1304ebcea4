"""Loads a model, restricts it to the common vocabulary and shards it if the strategy does."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lit_distill.models.causal_lm import CausalLM, check_head
from lit_distill.models.fixed_passes import check_fixed_passes
from lit_distill.models.fsdp import apply_fsdp, reshard_root
from lit_distill.models.lora import ADAPTER, LoraSpec, add_lora, fingerprint, restrict_state_dict_to_trainable
from lit_distill.models.packing import check_packing
from lit_distill.models.spec import ModelSpec, is_quantized, load_model, open_model, safetensors_reader
from lit_distill.models.tensor_parallel import apply_tensor_parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_distill.distributed import Sharding

log = logging.getLogger(__name__)


class ModelBuilder:
    """Builds a model in two steps: the constructor gives its shapes, and `finish` reads weights that are not loaded yet."""

    def __init__(self, spec: ModelSpec, key: str, dtype: torch.dtype | None, sharding: Sharding | None) -> None:
        self.spec = spec
        self.key = key
        self.sharding = sharding
        self.model: PreTrainedModel
        self.names: dict[str, str] | None = None
        with _seeded_initialization():
            if sharding is None or (
                spec.lora is not None and spec.lora.use_dora
            ):  # DoRA needs the weights for its norms
                self.model = load_model(spec, key, dtype)
            else:
                self.model, self.names = open_model(spec, key, dtype)
        if spec.lora is not None:
            self._add_lora(spec.lora)
        if sharding is None:
            return
        if is_quantized(spec, self.model.config):  # integer weights cannot be sharded: each process keeps all of them
            if spec.lora is not None:
                raise ValueError(
                    f"{key}.path: {spec.path} is quantised. A quantised model cannot be sharded, so fsdp2 cannot train it. Set "
                    "trainer.strategy: ddp, or use a base that is not quantised."
                )
            self.sharding = None
        elif self.names is None:
            log.info("%s.path: each process loads all of %s before sharding it.", key, spec.path)

    def _add_lora(self, lora: LoraSpec) -> None:
        stored = {id(p): (self.names or {}).get(name) for name, p in self.model.named_parameters()}
        with _seeded_initialization():
            add_lora(self.model, lora, f"{self.key}.lora")
        if self.names is not None:  # add_lora renames parameters and copies those of modules_to_save
            named = dict(self.model.named_parameters())
            originals = {name: name.replace(f"modules_to_save.{ADAPTER}", "original_module") for name in named}
            files = {name: stored.get(id(named[original])) for name, original in originals.items()}
            self.names = {name: file for name, file in files.items() if file is not None}

    def finish(self, vocabulary_size: int | None, padding_free: bool = True, frozen: bool = False) -> CausalLM:
        """Shard the model, read its weights and check it."""
        sharding = self.sharding
        if sharding is None:
            lm = CausalLM(self.model, vocabulary_size, self.spec.compile)
            if self.model.device.type != "meta" and not is_quantized(self.spec, self.model.config):
                lm.to(torch.get_default_device())  # Lightning's device: weights may have been created on the CPU
            device = self.model.device
        else:
            lm = CausalLM(self.model, vocabulary_size)
            lm.compiled = self.spec.compile
            device = self._apply_sharding(lm, sharding, frozen)
        lm.cuda_graphs = self.spec.cuda_graphs
        if self.spec.lora is not None:
            restrict_state_dict_to_trainable(lm)
        if device.type != "meta":
            check_head(lm, self.key, device)
            if frozen and lm.cuda_graphs:
                check_fixed_passes(lm, self.key, device)
            if padding_free:
                check_packing(lm, self.key, device)
            reshard_root(lm)
        return lm

    def _apply_sharding(self, lm: CausalLM, sharding: Sharding, frozen: bool) -> torch.device:
        kind = sharding.mesh.device_type
        device = torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
        if frozen:
            lm.requires_grad_(False)
        if self.spec.lora is not None:
            lm.base_fingerprint = self._fingerprint()
        if sharding.tensor_mesh is not None:
            apply_tensor_parallel(self.model, sharding.tensor_mesh, self.key)
        lm.unshard_for_generation = sharding.gather_teacher if frozen else sharding.gather_student
        lm.tensor_parallel_group = None if sharding.tensor_mesh is None else sharding.tensor_mesh.get_group()
        apply_fsdp(lm, self.model, sharding, frozen, self.spec.compile)
        if self.names is not None:
            offload = sharding.offload_teacher if frozen else sharding.offload_student
            shard_device = torch.device("cpu") if offload else device
            safetensors_reader(self.spec, self.key).load_shards(
                self.model, self.names, shard_device, f"{self.key}.path: {self.spec.path}"
            )
        return device

    def _fingerprint(self) -> int:
        if self.names is None:
            return fingerprint(self.model)
        names, weights = self.names, safetensors_reader(self.spec, self.key)
        return fingerprint(self.model, lambda name, positions: weights.values_at(names[name], positions))


@contextmanager
def _seeded_initialization() -> Iterator[None]:
    """Inside the context, new weights depend only on the seed of `seed_everything`, if set, and not on earlier draws."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(int(seed))
        yield
