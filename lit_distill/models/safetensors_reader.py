"""Reads safetensors files directly into shards, so that no process ever holds a whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import swap_tensors

from lit_distill.distributed import as_shard_of, shard_slice, slices
from lit_distill.models.checks import is_finite, refuse_infinite
from lit_distill.models.location import ModelLocation
from lit_distill.models.tying import tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside the context, new modules have parameters on the meta device but real buffers, which may be in no file."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class SafetensorsReader:
    """The safetensors files of a model, indexed by tensor name.

    Args:
        source: a folder or a hub repository.

    Raises:
        FileNotFoundError: if it has no safetensors files.
    """

    def __init__(self, source: ModelLocation) -> None:
        def find(name: str) -> str | None:
            from transformers.utils import cached_file

            file: str | None = cached_file(
                source.location, name, _raise_exceptions_for_missing_entries=False, **source.arguments()
            )
            return file

        self.files: dict[str, str] = {}
        if single := find("model.safetensors"):
            with safe_open(single, framework="pt") as opened:
                self.files = dict.fromkeys(opened.keys(), single)
        elif index := find("model.safetensors.index.json"):
            with open(index, encoding="utf-8") as text:  # noqa: PTH123 - transformers returns a str
                shards: Mapping[str, str] = json.load(text)["weight_map"]
            paths = {shard: find(shard) for shard in set(shards.values())}
            self.files = {name: path for name, shard in shards.items() if (path := paths[shard])}
        if not self.files:
            raise FileNotFoundError(f"{source.location} has no safetensors files.")

    def metadata(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and dtype (None if not floating-point) of every tensor, by its name in the files."""
        found = {}
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(self.files.values())}
            for name, path in self.files.items():
                part = opened[path].get_slice(name)
                found[name] = (tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
        return found

    def dtype(self) -> torch.dtype | None:
        """Dtype of the first floating-point tensor: the model's dtype if its config names none."""
        return next((dtype for _, dtype in self.metadata().values() if dtype), None)

    def match(self, model: PreTrainedModel) -> dict[int, str] | None:
        """The tensor name in the files of every parameter, by the parameter's `id`; None if names or shapes differ.

        Files saved from the bare body lack the body's prefix in their names.
        """
        names: dict[int, str] = {}
        wanted: dict[int, Tensor] = {}
        found = self._stored_names(model)
        for name, parameter in model.named_parameters(
            remove_duplicate=False
        ):  # tied weights may be stored under either name
            wanted[id(parameter)] = parameter
            if name in found:
                names.setdefault(id(parameter), found[name])
        persistent = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
        complete = wanted.keys() == names.keys() and not persistent
        return names if complete else None

    def _stored_names(self, model: PreTrainedModel) -> dict[str, str]:
        """The tensor name in the files, by parameter name, for each parameter found in them."""
        shapes = {name: shape for name, (shape, _) in self.metadata().items()}
        found: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            for candidate in (name, name.removeprefix(f"{model.base_model_prefix}.")):
                if shapes.get(candidate) == tuple(parameter.shape):
                    found.setdefault(name, candidate)
        return found

    def untied_names(self, model: PreTrainedModel) -> list[str]:
        """Names of parameters that are tied in ``model`` but have different values in the files."""
        found = self._stored_names(model)
        pairs = [(name, source) for name, source in tied_names(model).items() if {name, source} <= found.keys()]
        dtype = {name: model.get_parameter(name).dtype for name, _ in pairs}  # compared after rounding to the dtype
        return [name for name, source in pairs if not self._equal(found[name], found[source], dtype[name])]

    def _equal(self, first: str, second: str, dtype: torch.dtype, rows: int = 4096) -> bool:
        """Whether two tensors of the same shape have equal values; reads ``rows`` rows at a time."""
        with ExitStack() as stack:
            one, other = (
                stack.enter_context(safe_open(self.files[name], framework="pt")).get_slice(name)
                for name in (first, second)
            )
            starts = range(0, one.get_shape()[0], rows)
            return all(
                torch.equal(one[start : start + rows].to(dtype), other[start : start + rows].to(dtype))
                for start in starts
            )

    def values_at(self, name: str, positions: Sequence[int]) -> Tensor:
        """``[len(positions)]``: the values at these positions of the flattened tensor; nothing else is read."""
        with safe_open(self.files[name], framework="pt") as opened:
            stored = opened.get_slice(name)
            places = torch.unravel_index(torch.tensor(positions), stored.get_shape())
            rows = torch.stack(places, dim=-1).tolist()
            return torch.cat([stored[tuple(slice(i, i + 1) for i in row)].flatten() for row in rows])

    def load_shards(self, model: PreTrainedModel, names: Mapping[str, str], device: torch.device, where: str) -> None:
        """Load the values of the sharded parameters of ``model`` that are on the meta device.

        Args:
            model: its parameters are DTensors.
            names: tensor names in the files, by parameter name.
            device: where shards are stored.
            where: start of error messages.

        Raises:
            ValueError: if a weight is NaN or infinite.
        """
        bad: list[str] = []
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for name, parameter in model.named_parameters():
                if not (isinstance(parameter, DTensor) and parameter.is_meta):
                    continue
                path = self.files[names[name]]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                box = shard_slice(parameter)
                stored = opened[path].get_slice(names[name])
                values = stored[slices(box)] if box.num_elements else torch.empty(box.shape)
                if values.numel() and not is_finite(values):
                    bad.append(name)
                local = torch.empty(box.shape, dtype=parameter.dtype, device=device)
                local.copy_(values)  # values may be a view of the whole tensor
                # in place, since the parameter may be tied to another module
                swap_tensors(parameter, nn.Parameter(as_shard_of(parameter, local, device), parameter.requires_grad))
        everywhere: list[list[str]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, bad)  # so that all ranks raise
        refuse_infinite(sorted({name for names_of_rank in everywhere for name in names_of_rank}), where)
