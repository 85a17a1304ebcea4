"""Verifies an export: loads it as a user would, and compares it with the trained student.

First each weight is compared exactly, after rounding to the dtype of the export. Then logits are compared, which also detects a
wrong config, wrongly merged adapters and weights that the exported model does not use.
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
from lit_distill.models.checks import some
from lit_distill.models.fsdp import reshard_root
from lit_distill.models.spec import ModelSpec, is_quantized, load_config, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 5e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Allowed error of a token's logits by rounding, relative to their norm: between two devices for float32, and of weights and
activations for 16 bits."""
ADVICE = "To write it without this comparison, set export.verify: false (tools/export_student.py: --no-verify)."
CPU_UNSUPPORTED = "The student does not run on a CPU (%s), so only the weights of its export are compared."


class WrongExportError(ValueError):
    """The export differs from the trained student."""


class Expected(NamedTuple):
    """Expected results of an export."""

    logits: Tensor | None
    """[2, 8, V] float32, on the CPU; None if the student cannot run here."""
    dtype: torch.dtype
    """Dtype of the student's hidden states."""


@torch.no_grad()
def expected_of(lm: CausalLM, device: torch.device | None = None) -> Expected:
    """The logits of a student on two fixed prompts; a collective if it is sharded.

    Args:
        lm: the student.
        device: device of the inputs; by default that of the weights.
    """
    ids = _prompts(lm.vocabulary_size).to(device or lm.model.device)
    with lm.eval_mode():
        hidden = lm(ids, torch.ones_like(ids))
        logits = lm.head().logits(hidden.flatten(0, 1)).view(*ids.shape, -1).cpu()
    reshard_root(lm)
    return Expected(logits, hidden.dtype)


def expected_of_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Expected:
    """The logits of ``model`` with ``weights``, independent of which weights its config ties.

    Args:
        model: its parameters are on the meta device and are replaced by ``weights``.
        weights: the weights of all its parameters.

    Raises:
        ValueError: if they belong to another model.
    """
    missing, unknown = model.load_state_dict(dict(weights), strict=False, assign=True)
    if missing or unknown:
        raise ValueError(
            f"the checkpoint does not fit the model in its config. Missing: {some(missing)}; unknown: {some(unknown)}."
        )
    try:
        return expected_of(CausalLM(model.eval()))
    except Exception as error:  # noqa: BLE001 - from any library, such as for kernels that exist only for GPUs
        log.warning(CPU_UNSUPPORTED, error)
        return Expected(None, model.dtype)


def check_folder(folder: Path, weights: Mapping[str, Tensor], expected: Expected, trust_remote_code: bool) -> None:
    """Compare the model in an export folder with the trained student.

    Args:
        folder: export folder with config and weights.
        weights: weights of the trained student, by their names in its plain model.
        expected: logits of the trained student.
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
    """Load an exported adapter with peft and compare the base with this adapter with the trained student.

    Args:
        folder: export folder of the adapter.
        spec: spec of the student; its base is loaded again.
        weights: weights of the trained adapter, by their names in peft.
        expected: logits of the trained student.

    Raises:
        WrongExportError: naming the weights that differ.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    if is_quantized(spec, load_config(spec, "student")):  # some of its kernels exist only for GPUs
        log.info("The base is quantised, so only the weights of the adapter are compared, not its logits.")
        _raise_if_different(_differing_names(load_file(folder / "adapter_model.safetensors"), weights), [], None, 0.0)
        return
    base = load_model(spec, "student")
    try:
        with (
            warnings.catch_warnings()
        ):  # wrong warnings: about names in transformers, and patterns that do match fused experts
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
    _raise_if_different(_differing_names(own, weights), unread, _logit_error(model, expected), allowed)


def _raise_if_different(different: list[str], unread: list[str], error: float | None, allowed: float) -> None:
    wrong = error is not None and not error <= allowed  # NaN fails too
    if not (wrong or different or unread):
        return
    problems = [f"its logits are off by {error:.2%}, but rounding explains at most {allowed:.1%}"] if wrong else []
    problems += [f"weights that differ from the trained ones: {some(different)}"] if different else []
    problems += [f"weights that are unused or missing: {some(unread)}"] if unread else []
    problems += (
        ["no weight differs, so its config or its merged adapters are wrong"] if not (different or unread) else []
    )
    raise WrongExportError(f"the export differs from the trained student: {'; '.join(problems)}. {ADVICE}")


@torch.no_grad()
def _logit_error(model: Any, expected: Expected) -> float | None:
    """Error of the logits relative to their norm, as the median over the tokens.

    Not the maximum, since in a mixture of experts rounding may select another expert for a token.
    """
    if expected.logits is None or not expected.logits.isfinite().all():
        return None
    size = expected.logits.shape[-1]
    ids = _prompts(size)
    try:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[..., :size].float()
    except Exception as error:  # noqa: BLE001 - from any library, as above
        log.warning(CPU_UNSUPPORTED, error)
        return None
    distance = (found - expected.logits).norm(dim=-1) / expected.logits.norm(dim=-1).clamp(min=1e-9)
    return float(distance.quantile(0.5))


def _differing_names(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that are missing on one side, or that differ after rounding to the same dtype."""
    other = own.keys() ^ weights.keys()
    same = own.keys() & weights.keys()
    return sorted(
        other | {name for name in same if not torch.equal(own[name], weights[name].to("cpu", own[name].dtype))}
    )


def _prompts(vocabulary_size: int) -> Tensor:
    return torch.arange(16).view(2, 8) % vocabulary_size
