"""Hugging Face folders of a student, whole or not there at all, and read back before they take their place."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

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
    """A student with adapters as one plain model in the dtype of its base, or as the adapter alone, all or nothing."""
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
    """A new folder that takes the place of ``folder`` once it is complete; what is not the student goes elsewhere."""
    unfinished, wrong = (folder.with_name(f"{folder.name}.{kind}") for kind in ("unfinished", "wrong"))
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
    except WrongExportError as error:
        shutil.rmtree(wrong, ignore_errors=True)
        unfinished.rename(wrong)
        raise WrongExportError(f"{error} What was written lies in {wrong}.") from error
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def save_folder(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tokenizer: Any,
    folder: Path,
    dtype: str | None,
    expected: Expected | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """`save_pretrained` of ``weights`` in the shape of ``model``, with its tokenizer, all or nothing.

    Args:
        model: config and shape; its own weights do not matter.
        weights: by the names in ``model``.
        tokenizer: of the model.
        folder: where to; replaced if it exists.
        dtype: of the written weights; as they are by default.
        expected: what the folder has to compute when it is read back; not looked at by default.
        trust_remote_code: to read it back.

    Raises:
        WrongExportError: if it does not.
    """
    config = copy.deepcopy(model.config)
    tied = {name: source for name, source in tied_names(model).items() if {name, source} <= weights.keys()}
    if not all(_same(weights[name], weights[source]) for name, source in tied.items()):
        mark_untied(config)  # by the weights, whatever the config of an older checkpoint says
        weights = {**weights, **{name: weights[name].clone() for name in tied}}  # each has memory of its own
        tied = {}
    if dtype:
        weights = {name: w.to(getattr(torch, dtype)) if w.is_floating_point() else w for name, w in weights.items()}
    once = {name: weight for name, weight in weights.items() if name not in tied}  # tied again on loading
    config.dtype = next(w.dtype for w in once.values() if w.is_floating_point())  # in which the folder loads
    with replacing(folder) as unfinished:
        model.save_pretrained(unfinished, state_dict=once)
        config.architectures = model.config.architectures
        config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if expected is not None:
            check_folder(unfinished, weights, expected, trust_remote_code)
    return folder


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)
