"""A causal language model cut into shards over the ranks: its decoder blocks one by one, and the rest of it as one.

The rest (last norm, head, embeddings that are tied to it) belongs to the `CausalLM` itself, whose forward is the body. It
stays gathered from the forward, or from the moment somebody asks for the head, until the backward is done: so the head can
be applied a few rows at a time outside of any forward, and its gradient is reduced with that of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lit_distill.models.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_distill.models.causal_lm import CausalLM
    from lit_distill.parallel import Sharding


def shard(lm: CausalLM, sharding: Sharding, frozen: bool, compile_blocks: bool = False) -> None:
    """Cut a model into shards, in place.

    Args:
        lm: its parameters may be on the meta device, and then remain there, without values.
        sharding: over which ranks, and where shards are kept.
        frozen: a teacher, which runs in its own dtype.
        compile_blocks: run each block through `torch.compile`.
    """
    offload = sharding.offload_teacher if frozen else sharding.offload_student
    lm.gathers = sharding.gather_teacher if frozen else sharding.gather_student
    lm.partners = None if sharding.tensor_mesh is None else sharding.tensor_mesh.get_group()
    policy = MixedPrecisionPolicy()
    if not frozen:
        policy = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32)
    pinned = sharding.mesh.device_type != "cpu"
    settings: dict[str, Any] = {
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    }
    everyone = sharding.mesh if sharding.world_mesh is None else sharding.world_mesh
    for part in blocks_of(lm.model):
        embeddings = part is lm.model.get_input_embeddings()
        if compile_blocks and not embeddings:
            part.compile(dynamic=True)
        fully_shard(part, mesh=everyone if embeddings else sharding.mesh, **settings)
    fully_shard(lm, mesh=everyone, **settings)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """What is gathered as one: the modules that the model itself says must not be split, or else its decoder layers.

    Embeddings are gathered by themselves, so that nothing as large waits for them, unless the head is tied to them.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(end.weight) for end in (embeddings, head)}
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if (
            type(module).__name__ in names
            and id(module) not in inside
            and ends.isdisjoint(map(id, module.parameters()))
        ):
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    if not found:
        parent, name = decoder_layers(model, model.config.get_text_config(decoder=True).num_hidden_layers)
        found = list(getattr(parent, name))
    return found if embeddings.weight is head.weight else [embeddings, *found]


def is_sharded(module: nn.Module) -> bool:
    """Whether a model was cut into shards."""
    return isinstance(module, FSDPModule)


def gather_ends(module: nn.Module) -> None:
    """Gather what is not in the blocks, unless it is: a collective for all ranks. Nothing to do for a whole model."""
    if isinstance(module, FSDPModule):
        module.unshard()


def free_ends(module: nn.Module) -> None:
    """Give up what `gather_ends` has gathered."""
    if isinstance(module, FSDPModule):
        module.reshard()


@contextmanager
def held_whole(module: nn.Module) -> Iterator[None]:
    """Gather all of a sharded model once, and free it at the end; no forward in between waits for another rank."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def forget_forwards(module: nn.Module) -> None:
    """Drop the order in which blocks ran, which torch keeps for a backward that never comes for a frozen model."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            state._comm_ctx.post_forward_order.clear()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch before 2.12
            for group in groups:
                if group is not None:
                    group._post_forward_indices.clear()
