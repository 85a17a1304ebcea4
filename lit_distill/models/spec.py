"""`ModelSpec`: which model to load and how. Nothing is read before one of the `load_…` functions is called."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_distill.models.dropout import disable_dropout
from lit_distill.models.layers import keep_layers, resolve_layers
from lit_distill.models.lora import LoraSpec
from lit_distill.models.precision import auto_dtype
from lit_distill.models.quantized import quantization_config
from lit_distill.models.source import Source, check_folder, locate, naming
from lit_distill.models.tying import accept_untied, separate
from lit_distill.models.weights import check_causal, check_finite, check_report

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lit_distill.models.stored import StoredWeights

__all__ = [
    "ModelSpec",
    "build_on_meta",
    "disable_dropout",
    "load_config",
    "load_model",
    "load_tokenizer",
    "open_model",
    "spec_of",
]


@dataclass
class ModelSpec:
    """A causal language model from a local folder, the Hugging Face hub or a GGUF file.

    A GGUF file is dequantised. Its tokenizer may lack steps that GGUF does not record, such as the splitting of
    digits: name the original tokenizer in ``tokenizer`` where texts must be cut into tokens exactly as in pre-training.
    """

    path: str
    """Local folder, hub id or .gguf file. Weights are read from safetensors or GGUF only."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the default is its main branch."""
    tokenizer: str | None = None
    """Folder, hub id or .gguf file of the tokenizer; the default is `path`."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Type of the weights. By default the role decides: float32 for a student that trains, as stored for a teacher and for a
    student with adapters, which are float32 themselves. auto is bfloat16 where the device multiplies it fast, else float32, and
    float32 for all weights that train."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, …; the default is the fastest it finds."""
    keep_layers: list[int] | int | None = None
    """Build the model from these decoder layers only: indices (negative ones count from the end), or how many evenly
    spaced ones, with the first and the last."""
    drop_layers: list[int] | None = None
    """Build the model from all decoder layers but these."""
    from_scratch: bool = False
    """Random weights of this model's shape, drawn from the global seed, instead of the stored ones."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    compile: bool = False
    """Run the decoder through torch.compile."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Only for models whose code you have read."""
    gguf_file: str | None = None
    """Name of the GGUF file, where `path` is a hub id or a folder that holds several."""
    lora: LoraSpec | None = None
    """Student: train low-rank adapters, and leave the weights of `path` as they are."""
    quantization: dict[str, Any] | None = None
    """Load the weights in few bits: arguments of a configuration class of transformers, which ``quant_method`` chooses, such as
    {quant_method: bitsandbytes, load_in_4bit: true}. For a teacher, or a student with adapters. A model that is stored
    quantised needs none."""
    shared_with_student: bool = False
    """Teacher: be the student with its adapters switched off, in one copy of the weights; `path` is the student's."""


def spec_of(saved: dict[str, Any]) -> ModelSpec:
    """The spec that `dataclasses.asdict` has made a plain dictionary."""
    lora = saved.get("lora")
    return ModelSpec(**{**saved, "lora": lora and LoraSpec(**lora)})


def load_config(spec: ModelSpec, key: str) -> PreTrainedConfig:
    """The model's config as stored: before ``keep_layers`` or ``drop_layers``.

    Args:
        spec: the model.
        key: its YAML key, such as ``model.student``, for messages.

    Raises:
        ValueError: if it cannot be had, or is not of a causal (left-to-right, decoder-only) language model.
    """
    from transformers import AutoConfig

    source = _source(spec, key)
    check_folder(source, f"{key}.path", weights=False)
    arguments: dict[str, Any] = source.arguments()
    if spec.attn_implementation is not None:
        arguments["attn_implementation"] = spec.attn_implementation
    with naming(f"{key}.path", source):
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=spec.trust_remote_code, **arguments)
    check_causal(config, key, source.location)
    return config


def load_tokenizer(spec: ModelSpec, key: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer: ``spec.tokenizer``, or the one beside the weights.

    Raises:
        ValueError: if it cannot be had, or knows no tokens.
    """
    from transformers import AutoTokenizer

    own = spec.tokenizer is None
    name = f"{key}.path" if own else f"{key}.tokenizer"
    source = _source(spec, key) if own else locate(str(spec.tokenizer), name)
    with naming(name, source):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=spec.trust_remote_code, **source.arguments()
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up by transformers, for want of files
        raise ValueError(
            f"{name}: {source.location} has no tokenizer (its vocabulary would be {sorted(tokenizer.get_vocab())}). "
            f"Give one as {key}.tokenizer."
        )
    return tokenizer


def load_model(spec: ModelSpec, key: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model, pruned and checked, in evaluation mode.

    Inside ``torch.device("meta")`` it is built from its config and no weights are read.

    Args:
        spec: the model.
        key: its YAML key, such as ``model.student``, for messages.
        dtype: of the weights where ``spec.dtype`` does not say; None leaves them as stored.

    Raises:
        ValueError: if it cannot be had, is not causal, lacks weights, or holds NaN or infinite ones.
    """
    config = load_config(spec, key)
    total = config.get_text_config(decoder=True).num_hidden_layers
    layers = resolve_layers(total, spec.keep_layers, spec.drop_layers, key)
    dtype = _chosen_dtype(spec) or dtype
    shapes_only = torch.get_default_device().type == "meta"
    if shapes_only or spec.from_scratch:
        # drawn on the processor, whose draws are the same whatever the device and the strategy
        with naming(key, _source(spec, key)), nullcontext() if shapes_only else torch.device("cpu"):
            model = _build(config, dtype, spec.trust_remote_code)
        if (generation_config := _generation_config(spec, key)) is not None:
            model.generation_config = generation_config
    else:
        model = _read(spec, key, config, dtype)
    return _adapted(model, layers, spec, key)


def open_model(
    spec: ModelSpec, key: str, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, dict[str, str] | None]:
    """The model without its weights: parameters on the meta device, buffers with their values.

    Args:
        spec: the model.
        key: its YAML key, for messages.
        dtype: as for `load_model`.

    Returns:
        The model, pruned and in evaluation mode, and where its weights are: the name in `StoredWeights` of each parameter by its
        name. If they are not stored as the model has them (a GGUF file, renamed or fused weights, none at all for
        ``from_scratch``), the model of `load_model`, with its weights, and None.

    Raises:
        ValueError: as `load_model`.
    """
    from lit_distill.models.stored import parameters_on_meta

    source = _source(spec, key)
    config = load_config(spec, key)
    if spec.from_scratch or source.gguf_file is not None or is_quantized(spec, config):
        return load_model(spec, key, dtype), None
    check_folder(source, f"{key}.path", weights=True)
    with naming(f"{key}.path", source):
        stored = stored_weights(spec, key)
        own: torch.dtype | None = config.dtype or stored.dtype()  # type: ignore[assignment]
        wanted = _chosen_dtype(spec) or dtype or own
        with parameters_on_meta():
            model = _build(config, wanted, spec.trust_remote_code)
        separate(model, stored.apart(model), f"{key}.path: {source.location}")
        names = stored.plan(model)
    if names is None:
        return load_model(spec, key, dtype), None
    total = config.get_text_config(decoder=True).num_hidden_layers
    layers = resolve_layers(total, spec.keep_layers, spec.drop_layers, key)
    if (generation_config := _generation_config(spec, key)) is not None:
        model.generation_config = generation_config
    model = _adapted(model, layers, spec, key)
    return model, {name: names[id(parameter)] for name, parameter in model.named_parameters()}


def stored_weights(spec: ModelSpec, key: str) -> StoredWeights:
    """The files in which `open_model` has found the weights."""
    from lit_distill.models.stored import StoredWeights

    source = _source(spec, key)
    with naming(f"{key}.path", source):
        return StoredWeights(source)


def _chosen_dtype(spec: ModelSpec) -> torch.dtype | None:
    """What ``spec.dtype`` names; ``auto``, which a run has resolved for its device, is that of this machine."""
    if spec.dtype == "auto":
        return auto_dtype("cuda" if torch.cuda.is_available() else "cpu")
    return None if spec.dtype is None else getattr(torch, spec.dtype)


def _adapted(model: PreTrainedModel, layers: list[int] | None, spec: ModelSpec, key: str) -> PreTrainedModel:
    if layers is not None:
        keep_layers(model, layers)
    if spec.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"{key}.gradient_checkpointing is true, but {type(model).__name__} does not support it.")
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.eval()


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of ``config`` without weights, on the meta device: its shapes, for the price of none of its memory."""
    with torch.device("meta"):
        return _build(config, dtype, trust_remote_code=False)


def _build(config: PreTrainedConfig, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    stored: torch.dtype | None = config.dtype  # type: ignore[assignment]
    dtype = dtype or stored or torch.float32  # said aloud: a precision plugin may have changed torch's default
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()


def _read(spec: ModelSpec, key: str, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    source = _source(spec, key)
    check_folder(source, f"{key}.path", weights=True)
    arguments: dict[str, Any] = source.arguments()
    if source.gguf_file is None:
        arguments["use_safetensors"] = True
    else:
        arguments |= _dequantize()
    if spec.quantization is not None:
        if hasattr(config, "quantization_config"):
            raise ValueError(f"{key}.quantization: {source.location} is stored quantised already. Remove it.")
        arguments["quantization_config"] = quantization_config(spec.quantization, f"{key}.quantization")
    with naming(f"{key}.path", source), _device_to_read_on():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=spec.trust_remote_code,
            ignore_mismatched_sizes=True,  # reported below with everything else that does not fit
            output_loading_info=True,
            **arguments,
        )
    model: PreTrainedModel = loaded[0]
    check_report(loaded[1], f"{key}.path: {source.location}")
    check_finite(model, f"{key}.path: {source.location}")
    accept_untied(model, f"{key}.path: {source.location}")
    if source.gguf_file is not None and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # save_pretrained refuses a model that calls itself quantised
    return model


def _device_to_read_on() -> AbstractContextManager[Any]:
    """Lightning's device, whose context we are in; the processor where `accelerate` is missing, which transformers then needs."""
    return nullcontext() if importlib.util.find_spec("accelerate") else torch.device("cpu")


def is_quantized(spec: ModelSpec, config: PreTrainedConfig) -> bool:
    """Whether a model is in few bits, by its config or because the spec asks for it; a GGUF file is dequantised."""
    return spec.quantization is not None or hasattr(config, "quantization_config")


def _source(spec: ModelSpec, key: str) -> Source:
    return locate(spec.path, f"{key}.path", spec.gguf_file, spec.revision)


def _dequantize() -> dict[str, Any]:
    """Arguments that ask for plain weights; versions before `GgufConfig` know nothing else."""
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def _generation_config(spec: ModelSpec, key: str) -> GenerationConfig | None:
    from transformers import GenerationConfig

    source = _source(spec, key)
    if source.gguf_file is not None:
        return None
    try:
        return GenerationConfig.from_pretrained(source.location, **source.arguments())
    except OSError:  # a model without one: transformers derives it from the config
        return None
