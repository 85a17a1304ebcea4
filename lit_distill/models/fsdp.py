"""Shards a causal language model over the ranks: each decoder block is one FSDP unit, and the rest of the model is another.

The rest (last norm, LM head, embeddings tied to it) is the root unit, the `CausalLM` itself, whose forward is the body. It
stays gathered from the forward, or from the call of `CausalLM.head`, until the end of the backward pass. Therefore the head can
be applied to a few rows at a time outside of any forward, and its gradient is reduced together with that of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lit_distill.models.pruning import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_distill.distributed import Sharding


def apply_fsdp(
    lm: nn.Module, model: PreTrainedModel, sharding: Sharding, frozen: bool, compile_blocks: bool = False
) -> None:
    """Shard a model in place.

    Args:
        lm: the `CausalLM`; parameters on the meta device stay there, without values.
        model: the transformers model inside ``lm``, which has the blocks.
        sharding: the meshes, and where shards are stored.
        frozen: whether it is a teacher, which runs in its own dtype.
        compile_blocks: compile each block with `torch.compile`.
    """
    offload = sharding.offload_teacher if frozen else sharding.offload_student
    policy = MixedPrecisionPolicy()
    if not frozen:
        policy = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32)
    pinned = sharding.mesh.device_type != "cpu"
    settings: dict[str, Any] = {
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    }
    everyone = sharding.mesh if sharding.world_mesh is None else sharding.world_mesh
    for part in blocks_of(model):
        embeddings = part is model.get_input_embeddings()
        if compile_blocks and not embeddings:
            part.compile(dynamic=True)
        fully_shard(part, mesh=everyone if embeddings else sharding.mesh, **settings)
    fully_shard(lm, mesh=everyone, **settings)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that become one FSDP unit each: those in the model's ``_no_split_modules``, or else its decoder layers.

    Embeddings that are not tied to the head are a unit of their own, so that they are not kept gathered with the head.
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
    """Whether a model is sharded."""
    return isinstance(module, FSDPModule)


def unshard_root(module: nn.Module) -> None:
    """Gather the root unit (all but the blocks) if it is sharded and not gathered yet; a collective."""
    if isinstance(module, FSDPModule):
        module.unshard()


def reshard_root(module: nn.Module) -> None:
    """Free what `unshard_root` gathered."""
    if isinstance(module, FSDPModule):
        module.reshard()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather a sharded model once and free it at the end; no forward inside the context waits for another rank."""
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


def clear_forward_order(module: nn.Module) -> None:
    """Clear the order of block forwards that torch records for a backward pass, which a frozen model never has."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            state._comm_ctx.post_forward_order.clear()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch before 2.12
            for group in groups:
                if group is not None:
                    group._post_forward_indices.clear()
