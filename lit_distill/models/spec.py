"""`ModelSpec`: which model to load and how. No file is read until one of the `load_…` functions is called."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_distill.models.checks import check_causal, check_finite, check_report
from lit_distill.models.dropout import disable_dropout
from lit_distill.models.location import ModelLocation, check_folder, resolve_location, wrap_load_errors
from lit_distill.models.lora import LoraSpec
from lit_distill.models.precision import auto_dtype
from lit_distill.models.pruning import PRUNED_FROM, keep_layers, resolve_layers
from lit_distill.models.quantization import quantization_config
from lit_distill.models.tying import accept_untied, separate

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lit_distill.models.safetensors_reader import SafetensorsReader

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
    digits. If texts must be tokenised exactly as in pre-training, set ``tokenizer`` to the original tokenizer.
    """

    path: str
    """Local folder, hub id or .gguf file. Weights are read from safetensors or GGUF only."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the default is its main branch."""
    tokenizer: str | None = None
    """Folder, hub id or .gguf file of the tokenizer; the default is `path`."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Dtype of the weights. Default: float32 for a student whose weights are all trained; as stored for a teacher and for the base
    of a student with adapters. Adapters are always float32. auto: bfloat16 if the device multiplies it fast, else float32; trained
    weights are always float32."""
    attn_implementation: str | None = None
    """Attention implementation of transformers: eager, sdpa, flash_attention_2, …; the default is the fastest available."""
    keep_layers: list[int] | int | None = None
    """Keep only these decoder layers: a list of indices (negative ones count from the end), or the number of evenly spaced
    layers, which include the first and the last."""
    drop_layers: list[int] | None = None
    """Remove these decoder layers."""
    from_scratch: bool = False
    """Initialise the weights randomly from the global seed instead of loading them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third more time."""
    compile: bool = False
    """Run the decoder through torch.compile where it reads whole texts; it generates as it is."""
    cuda_graphs: bool = False
    """Generate with CUDA graphs: all kernels of a step start at once. For student and teacher on a CUDA device, not sharded, with
    sdpa attention over the whole text."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Only for models whose code you have read."""
    gguf_file: str | None = None
    """Name of the GGUF file, if `path` is a hub id or a folder with several of them."""
    lora: LoraSpec | None = None
    """Student only: train low-rank adapters and keep the weights of `path` frozen."""
    quantization: dict[str, Any] | None = None
    """Quantise the weights while loading: ``quant_method`` and the arguments of its configuration class in transformers, such as
    {quant_method: bitsandbytes, load_in_4bit: true}. For a teacher, or a student with adapters. Not needed for a model that is
    stored quantised."""
    shared_with_student: bool = False
    """Teacher only: use the student with its adapters disabled, so that both share one copy of the weights. `path` must be the
    student's."""


def spec_of(saved: dict[str, Any]) -> ModelSpec:
    """Restore a spec from the dictionary that `dataclasses.asdict` made of it."""
    lora = saved.get("lora")
    return ModelSpec(**{**saved, "lora": lora and LoraSpec(**lora)})


def load_config(spec: ModelSpec, key: str) -> PreTrainedConfig:
    """The model's config as stored: before ``keep_layers`` or ``drop_layers``.

    Args:
        spec: the model.
        key: the argument that gives it, such as ``student``, for messages.

    Raises:
        ValueError: if it cannot be loaded, or the model is not a causal (decoder-only) language model.
    """
    from transformers import AutoConfig

    source = _location(spec, key)
    check_folder(source, f"{key}.path", weights=False)
    arguments: dict[str, Any] = source.arguments()
    if spec.attn_implementation is not None:
        arguments["attn_implementation"] = spec.attn_implementation
    with wrap_load_errors(f"{key}.path", source):
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=spec.trust_remote_code, **arguments)
    check_causal(config, key, source.location)
    return config


def load_tokenizer(spec: ModelSpec, key: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer: ``spec.tokenizer``, or the one beside the weights.

    Raises:
        ValueError: if it cannot be loaded, or has no tokens.
    """
    from transformers import AutoTokenizer

    own = spec.tokenizer is None
    name = f"{key}.path" if own else f"{key}.tokenizer"
    source = _location(spec, key) if own else resolve_location(str(spec.tokenizer), name)
    if own:
        check_folder(source, name, weights=False)
    with wrap_load_errors(name, source):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=spec.trust_remote_code, **source.arguments()
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers invents an empty one if there are no files
        raise ValueError(
            f"{name}: {source.location} has no tokenizer (its vocabulary would be {sorted(tokenizer.get_vocab())}). "
            f"Set {key}.tokenizer."
        )
    return tokenizer


def load_model(spec: ModelSpec, key: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the model, prune and check it; returned in evaluation mode.

    Inside ``torch.device("meta")`` it is built from its config without reading weights.

    Args:
        spec: the model.
        key: the argument that gives it, such as ``student``, for messages.
        dtype: dtype of the weights if ``spec.dtype`` is None; None keeps the stored dtype.

    Raises:
        ValueError: if it cannot be loaded, is not causal, lacks weights, or has NaN or infinite weights.
    """
    config = load_config(spec, key)
    layers = _kept_layers(spec, config, key)
    dtype = _chosen_dtype(spec) or dtype
    shapes_only = torch.get_default_device().type == "meta"
    if shapes_only or spec.from_scratch:
        # random weights are drawn on the CPU, so that they are the same for every device and strategy
        with wrap_load_errors(key, _location(spec, key)), nullcontext() if shapes_only else torch.device("cpu"):
            model = _build(config, dtype, spec.trust_remote_code)
        if (generation_config := _generation_config(spec, key)) is not None:
            model.generation_config = generation_config
    else:
        model = _load_weights(spec, key, config, dtype)
    return _prune_and_configure(model, layers, spec, key)


def open_model(
    spec: ModelSpec, key: str, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, dict[str, str] | None]:
    """Build the model without its weights: parameters on the meta device, buffers with their values.

    Args:
        spec: the model.
        key: its YAML key, for messages.
        dtype: as for `load_model`.

    Returns:
        The model, pruned and in evaluation mode, and for each parameter name the name of its tensor in `SafetensorsReader`.
        If the files do not store the parameters one to one (a GGUF file, renamed or fused weights, or ``from_scratch``), the
        result of `load_model`, with weights, and None.

    Raises:
        ValueError: as `load_model`.
    """
    from lit_distill.models.safetensors_reader import parameters_on_meta

    source = _location(spec, key)
    config = load_config(spec, key)
    if spec.from_scratch or source.gguf_file is not None or is_quantized(spec, config):
        return load_model(spec, key, dtype), None
    check_folder(source, f"{key}.path", weights=True)
    with wrap_load_errors(f"{key}.path", source):
        stored = safetensors_reader(spec, key)
        own: torch.dtype | None = config.dtype or stored.dtype()  # type: ignore[assignment]
        wanted = _chosen_dtype(spec) or dtype or own
        with parameters_on_meta():
            model = _build(config, wanted, spec.trust_remote_code)
        separate(model, stored.untied_names(model), f"{key}.path: {source.location}")
        names = stored.match(model)
    if names is None:
        return load_model(spec, key, dtype), None
    layers = _kept_layers(spec, config, key)
    if (generation_config := _generation_config(spec, key)) is not None:
        model.generation_config = generation_config
    model = _prune_and_configure(model, layers, spec, key)
    return model, {name: names[id(parameter)] for name, parameter in model.named_parameters()}


def _kept_layers(spec: ModelSpec, config: PreTrainedConfig, key: str) -> list[int] | None:
    """The layers to keep, or None for all; says so, and warns if the model has lost layers before."""
    config = config.get_text_config(decoder=True)
    total = config.num_hidden_layers
    layers = resolve_layers(total, spec.keep_layers, spec.drop_layers, key)
    if layers is None:
        return None
    key = key if key.startswith("model.") else f"model.{key}"
    rank_zero_info(f"{key}: {len(layers)} of {total} layers are kept.")
    before = getattr(config, PRUNED_FROM, None)
    if before and len(layers) < total:
        name = "keep_layers" if spec.drop_layers is None else "drop_layers"
        rank_zero_warn(
            f"{key}.{name}: {spec.path} has lost layers before: it has {total} of {before}, and now keeps {len(layers)}. If it is "
            f"the student of an earlier run, set {key}.{name}: null."
        )
    return layers


def safetensors_reader(spec: ModelSpec, key: str) -> SafetensorsReader:
    """Reader of the files in which `open_model` found the weights."""
    from lit_distill.models.safetensors_reader import SafetensorsReader

    source = _location(spec, key)
    with wrap_load_errors(f"{key}.path", source):
        return SafetensorsReader(source)


def _chosen_dtype(spec: ModelSpec) -> torch.dtype | None:
    """``spec.dtype`` as a torch dtype. ``auto`` is resolved for this machine; a run has resolved it before, for its own device."""
    if spec.dtype == "auto":
        return auto_dtype("cuda" if torch.cuda.is_available() else "cpu")
    return None if spec.dtype is None else getattr(torch, spec.dtype)


def _prune_and_configure(
    model: PreTrainedModel, layers: list[int] | None, spec: ModelSpec, key: str
) -> PreTrainedModel:
    if layers is not None:
        keep_layers(model, layers)
    if spec.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"{key}.gradient_checkpointing is true, but {type(model).__name__} does not support it.")
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.eval()


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of ``config`` on the meta device: shapes without weights, so it takes no memory."""
    with torch.device("meta"):
        return _build(config, dtype, trust_remote_code=False)


def _build(config: PreTrainedConfig, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    stored: torch.dtype | None = config.dtype  # type: ignore[assignment]
    dtype = dtype or stored or torch.float32  # explicit: a precision plugin may have changed torch's default dtype
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()


def _load_weights(spec: ModelSpec, key: str, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    source = _location(spec, key)
    check_folder(source, f"{key}.path", weights=True)
    arguments: dict[str, Any] = source.arguments()
    if source.gguf_file is None:
        arguments["use_safetensors"] = True
    else:
        arguments |= _dequantize()
    if spec.quantization is not None:
        if hasattr(config, "quantization_config"):
            raise ValueError(
                f"{key}.quantization: {source.location} is stored quantised already. Remove {key}.quantization."
            )
        arguments["quantization_config"] = quantization_config(spec.quantization, f"{key}.quantization")
    with wrap_load_errors(f"{key}.path", source), _loading_device():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=spec.trust_remote_code,
            ignore_mismatched_sizes=True,  # check_report reports them below, with all other mismatches
            output_loading_info=True,
            **arguments,
        )
    model: PreTrainedModel = loaded[0]
    check_report(loaded[1], f"{key}.path: {source.location}")
    check_finite(model, f"{key}.path: {source.location}")
    accept_untied(model, f"{key}.path: {source.location}")
    if source.gguf_file is not None and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # save_pretrained refuses a model with this attribute
    return model


def _loading_device() -> AbstractContextManager[Any]:
    """Keep Lightning's device context if `accelerate` is installed, which transformers needs for it; else load on the CPU."""
    return nullcontext() if importlib.util.find_spec("accelerate") else torch.device("cpu")


def is_quantized(spec: ModelSpec, config: PreTrainedConfig) -> bool:
    """Whether the model is quantised, by its config or by the spec. A GGUF file does not count, as it is dequantised."""
    return spec.quantization is not None or hasattr(config, "quantization_config")


def _location(spec: ModelSpec, key: str) -> ModelLocation:
    return resolve_location(spec.path, f"{key}.path", spec.gguf_file, spec.revision)


def _dequantize() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` to dequantise a GGUF file; versions of transformers without `GgufConfig` always do."""
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def _generation_config(spec: ModelSpec, key: str) -> GenerationConfig | None:
    from transformers import GenerationConfig

    source = _location(spec, key)
    if source.gguf_file is not None:
        return None
    try:
        return GenerationConfig.from_pretrained(source.location, **source.arguments())
    except OSError:  # the model has none: transformers derives it from the config
        return None
