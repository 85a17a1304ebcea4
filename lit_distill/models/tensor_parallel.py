"""Tensor parallelism of decoder blocks, by the plan in the model's config.

The input and output of a block are complete and equal on all ranks of a group. Inside the block, each rank computes some of the
attention heads and some of the columns of the feed-forward layer; an all-reduce at its end adds up the partial sums. Shoeybi et al.
2019, https://arxiv.org/abs/1909.08053, section 3. Embeddings, norms and head are not split this way, only sharded by FSDP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lit_distill.models.lora import ADAPTER
from lit_distill.models.pruning import decoder_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    # norms of queries and keys, [B, T, heads, size]: each rank has some of the heads
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}
"""Styles in transformers' plans, with old names. Expert layers use other styles, which are refused."""


def apply_tensor_parallel(model: PreTrainedModel, mesh: DeviceMesh, key: str) -> None:
    """Split the matrices of every decoder block over the ranks of ``mesh``, in place.

    Args:
        model: model with parameters on any device, also the meta device; may have adapters.
        mesh: one-dimensional device mesh of the ranks that compute each block together.
        key: YAML key of the model, for messages.

    Raises:
        ValueError: if the model has no plan, or the ranks cannot split its heads or widths evenly.
    """
    size = mesh.size()
    advice = "Set trainer.strategy.init_args.tensor_parallel_size: 1: models stay sharded, but each rank computes whole blocks."
    config = model.config.get_text_config(decoder=True)
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    if not plan:
        raise ValueError(f"{key}.path: {type(model).__name__} has no tensor-parallel plan. {advice}")
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (heads := getattr(config, name, None) or size) % size:
            raise ValueError(f"{key}.path: {name} is {heads}, which {size} ranks cannot split evenly. {advice}")
    parent, blocks = decoder_layers(model, config.num_hidden_layers)
    styles: dict[str, ParallelStyle] = {}
    for name, module in parent.named_modules():
        style = next((style for pattern, style in plan.items() if _matches(pattern, name)), None)
        if style is None or not name.startswith(f"{blocks}."):
            continue
        if style not in STYLES:
            raise ValueError(
                f"{key}.path: {type(model).__name__}'s plan has the unsupported style {style!r} for {name}. {advice}"
            )
        for part, its_style in _parts(name, module, style):
            _check_width(parent.get_submodule(part), its_style, size, f"{key}.path: {part}", advice)
            styles[part] = STYLES[its_style]()
    parallelize_module(parent, mesh, styles, src_data_rank=None)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _parts(name: str, module: nn.Module, style: str) -> Iterator[tuple[str, str]]:
    """Names and styles of the modules to split: the module itself, or its base layer and one half of its adapter."""
    if hasattr(module, "modules_to_save"):
        yield f"{name}.original_module", style
        yield f"{name}.modules_to_save.{ADAPTER}", style
    elif ADAPTER in getattr(module, "lora_A", ()):
        yield f"{name}.base_layer", style
        half = "lora_B" if style.startswith("col") else "lora_A"
        yield f"{name}.{half}.{ADAPTER}", style
    else:
        yield name, style


def _check_width(module: nn.Module, style: str, size: int, place: str, advice: str) -> None:
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return
    width = weight.shape[0] if style.startswith("col") else weight.shape[1]
    if width % size:
        raise ValueError(f"{place} has {width} {'outputs' if style.startswith('col') else 'inputs'}, which {size} ranks cannot "
                         f"split evenly. {advice}")  # fmt: skip
