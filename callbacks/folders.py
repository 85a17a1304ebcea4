"""Writes Hugging Face folders of a student atomically, and verifies them before they get their final name."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.files import commit, remove, temporary_path
from lit_distill.models.merging import merged_weights, save_adapter
from lit_distill.models.readback import Expected, WrongExportError, check_adapter, check_folder
from lit_distill.models.tying import mark_untied, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_distill.models import ModelSpec


def save_adapted(
    model: PreTrainedModel,
    spec: ModelSpec,
    tokenizer: Any,
    folder: Path,
    dtype: str | None,
    merge: bool,
    expected: Expected | None,
) -> Path:
    """Write a student with adapters atomically: merged, in the dtype of its base by default, or the adapter alone."""
    from transformers import AutoModelForCausalLM

    if merge:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.config, trust_remote_code=spec.trust_remote_code)
        plain.generation_config = model.generation_config
        own = next(str(p.dtype) for p in model.parameters() if not p.requires_grad).removeprefix("torch.")
        weights = merged_weights(model)
        return save_folder(plain, weights, tokenizer, folder, dtype or own, expected, spec.trust_remote_code)
    with replacing(folder) as unfinished:
        written = save_adapter(model, spec, unfinished, getattr(torch, dtype) if dtype else None)
        tokenizer.save_pretrained(unfinished)
        if expected is not None:
            check_adapter(unfinished, spec, written, expected)
    return folder


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` at the end; one that fails verification becomes ``<name>.wrong``."""
    unfinished, wrong = temporary_path(folder), folder.with_name(f"{folder.name}.wrong")
    remove(unfinished)
    try:
        yield unfinished
    except WrongExportError as error:
        commit(unfinished, wrong)
        raise WrongExportError(f"{error} The written files are in {wrong}.") from error
    commit(unfinished, folder)


def save_folder(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tokenizer: Any,
    folder: Path,
    dtype: str | None,
    expected: Expected | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write ``weights`` with `save_pretrained` of ``model``, and the tokenizer, atomically.

    Args:
        model: gives config and architecture; its own weights are not used.
        weights: weights by their names in ``model``.
        tokenizer: tokenizer of the model.
        folder: output folder; replaced if it exists.
        dtype: dtype of the written weights; unchanged by default.
        expected: outputs that the folder must reproduce when it is read back; not checked if None.
        trust_remote_code: used when it is read back.

    Raises:
        WrongExportError: if it does not reproduce ``expected``.
    """
    config = copy.deepcopy(model.config)
    tied = {name: source for name, source in tied_names(model).items() if {name, source} <= weights.keys()}
    if not all(_same(weights[name], weights[source]) for name, source in tied.items()):
        mark_untied(config)  # the weights decide: the config of an older checkpoint may be wrong
        weights = {**weights, **{name: weights[name].clone() for name in tied}}  # separate memory for each
        tied = {}
    if dtype:
        weights = {name: w.to(getattr(torch, dtype)) if w.is_floating_point() else w for name, w in weights.items()}
    once = {name: weight for name, weight in weights.items() if name not in tied}  # tied again on loading
    config.dtype = next(
        w.dtype for w in once.values() if w.is_floating_point()
    )  # the dtype in which the folder is loaded
    with replacing(folder) as unfinished:
        model.save_pretrained(unfinished, state_dict=once)
        config.architectures = model.config.architectures
        config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for file in unfinished.glob("*.safetensors"):  # new versions of safetensors let their owner alone read them
            shutil.copymode(unfinished / "config.json", file)
        if expected is not None:
            check_folder(unfinished, weights, expected, trust_remote_code)
    return folder


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)
