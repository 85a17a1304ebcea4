"""An export is read back once, as a user would read it, and has to compute what the trained student does.

Weights are compared one by one, exactly but for the rounding to the dtype they are written in; and then logits, which also see what
no weight tells: the config, adapters that were merged, weights that the folder's model does not use.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.models.causal_lm import CausalLM
from lit_distill.models.sharding import free_ends
from lit_distill.models.spec import ModelSpec, is_quantized, load_config, load_model
from lit_distill.models.weights import some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 5e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""How far the logits of a token may be off by rounding, as a share of their norm: that of two devices for float32, and of weights
and activations for the others."""
ADVICE = "To write it without this comparison, set export.verify: false (tools/export_student.py: --no-verify)."
NOT_HERE = "The student does not run on a processor (%s), so only the weights of its export are compared."


class WrongExportError(ValueError):
    """What was written is not the trained student."""


class Expected(NamedTuple):
    """What a student computes."""

    logits: Tensor | None
    """[2, 8, V] float32, in host memory; None if it cannot run here."""
    dtype: torch.dtype
    """Of its hidden states."""


@torch.no_grad()
def expected_of(lm: CausalLM, device: torch.device | None = None) -> Expected:
    """The logits of a student on two fixed prompts; a collective if it is sharded.

    Args:
        lm: the student.
        device: where its inputs go; by default where its weights are.
    """
    ids = _prompts(lm.vocabulary_size).to(device or lm.model.device)
    with lm.quiet():
        hidden = lm(ids, torch.ones_like(ids))
        logits = lm.head().logits(hidden.flatten(0, 1)).view(*ids.shape, -1).cpu()
    free_ends(lm)
    return Expected(logits, hidden.dtype)


def expected_of_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Expected:
    """The logits of ``model`` with ``weights``, whatever its config ties.

    Args:
        model: its parameters are on the meta device, and become those weights.
        weights: of all of its parameters.

    Raises:
        ValueError: if they are of another model.
    """
    missing, unknown = model.load_state_dict(dict(weights), strict=False, assign=True)
    if missing or unknown:
        raise ValueError(
            f"the checkpoint is not of the model that its config describes: {some(missing)} missing, {some(unknown)} unknown."
        )
    try:
        return expected_of(CausalLM(model.eval()))
    except Exception as error:  # noqa: BLE001 - of any library, such as for kernels that only a GPU has
        log.warning(NOT_HERE, error)
        return Expected(None, model.dtype)


def check_folder(folder: Path, weights: Mapping[str, Tensor], expected: Expected, trust_remote_code: bool) -> None:
    """Compare the model that a folder loads as with the trained one.

    Args:
        folder: with config and weights.
        weights: of the trained student, by the names of its plain model.
        expected: its logits.
        trust_remote_code: see `ModelSpec`.

    Raises:
        WrongExportError: naming the weights that differ.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except Exception as error:  # of any library
        raise WrongExportError(f"the export cannot be loaded. {type(error).__name__}: {error}. {ADVICE}") from error
    model, report = loaded
    unread = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    _compare(model.eval(), model.state_dict(), weights, unread, expected)


def check_adapter(folder: Path, spec: ModelSpec, weights: Mapping[str, Tensor], expected: Expected) -> None:
    """Compare the base with an adapter that peft reads from a folder with the trained student.

    Args:
        folder: of the adapter.
        spec: of the student, whose base is read again.
        weights: of the trained adapter, by the names of peft.
        expected: the student's logits.

    Raises:
        WrongExportError: naming the weights that differ.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    if is_quantized(spec, load_config(spec, "model.student")):  # some of its kernels are a GPU's
        log.info("The base is quantised, so the adapter is compared as it is in its file, and not what it computes.")
        _judge(_different(load_file(folder / "adapter_model.safetensors"), weights), [], None, 0.0)
        return
    base = load_model(spec, "model.student")
    try:
        with warnings.catch_warnings():  # of names in transformers, and of patterns that do match fused experts
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # of any library
        raise WrongExportError(f"peft cannot load the adapter. {type(error).__name__}: {error}. {ADVICE}") from error
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    _compare(model.eval(), own, weights, [], expected)


def _compare(
    model: Any, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], unread: list[str], expected: Expected
) -> None:
    dtypes = {w.dtype for w in (*model.parameters(), *weights.values()) if w.is_floating_point()} | {expected.dtype}
    allowed = max(TOLERANCE.get(dtype, 0.1) for dtype in dtypes)
    _judge(_different(own, weights), unread, _logit_error(model, expected), allowed)


def _judge(different: list[str], unread: list[str], error: float | None, allowed: float) -> None:
    wrong = error is not None and not error <= allowed  # NaN is wrong
    if not (wrong or different or unread):
        return
    said = [f"its logits are off by {error:.2%}, and rounding explains {allowed:.1%}"] if wrong else []
    said += [f"weights that differ from the trained ones: {some(different)}"] if different else []
    said += [f"weights in the files that the model does not have, or that it lacks: {some(unread)}"] if unread else []
    said += ["no weight differs, so its config or its merged adapters do"] if not (different or unread) else []
    raise WrongExportError(f"the export does not compute what the trained student does: {'; '.join(said)}. {ADVICE}")


@torch.no_grad()
def _logit_error(model: Any, expected: Expected) -> float | None:
    """How far the logits of the middle one of all tokens are off, as a share of their norm.

    Not of the worst: where experts are chosen, rounding may choose another for a token.
    """
    if expected.logits is None or not expected.logits.isfinite().all():
        return None
    size = expected.logits.shape[-1]
    ids = _prompts(size)
    try:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[..., :size].float()
    except Exception as error:  # noqa: BLE001 - as above
        log.warning(NOT_HERE, error)
        return None
    distance = (found - expected.logits).norm(dim=-1) / expected.logits.norm(dim=-1).clamp(min=1e-9)
    return float(distance.quantile(0.5))


def _different(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """The names under which the weights that were read are not the trained ones, rounded alike."""
    other = own.keys() ^ weights.keys()
    same = own.keys() & weights.keys()
    return sorted(
        other | {name for name in same if not torch.equal(own[name], weights[name].to("cpu", own[name].dtype))}
    )


def _prompts(vocabulary_size: int) -> Tensor:
    return torch.arange(16).view(2, 8) % vocabulary_size
