"""Which models can decode in fixed passes; a recorder of operations stands for the CUDA graphs."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from architectures import RECURRENT, tiny
from recording import Recording
from tiny import tiny_llama
from torch import Tensor, nn

from lit_distill.models import CausalLM, ModelSpec, fixed_passes, validate_specs
from lit_distill.models.fixed_passes import check_fixed_passes
from lit_distill.models.kv_cache import FixedLayer
from lit_distill.models.lora import LoraSpec
from lit_distill.models.replay import Replays
from lit_distill.models.roles import check_graphs

CPU = torch.device("cpu")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Records the passes of a check."""
    made: list[Recording] = []

    def replays(capture: object) -> Replays:
        made.append(Recording(living))
        return Replays(made[-1])

    monkeypatch.setattr(fixed_passes, "Replays", replays)
    return made


def living() -> Iterator[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some objects of torch warns
        yield from (each for each in gc.get_objects() if isinstance(each, Tensor))


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gpt2", "gemma", "phi3", "olmo2", "smollm3", "qwen3_moe", "granitemoe"]
)
def test_models_with_attention_to_everything_can(model_type: str, recordings: list[Recording]) -> None:
    lm = CausalLM(tiny(model_type))
    check_fixed_passes(lm, "student", CPU)
    assert recordings[0].captures == 2


@pytest.mark.parametrize(
    ("model_type", "settings", "why"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window or a recurrent state"),
        ("bloom", {}, "its attention is eager"),
        ("qwen3_next", RECURRENT["qwen3_next"], ""),  # older versions of transformers have a cache of their own for it
        ("falcon", {}, "from outside"),
    ],
)
def test_others_are_refused_with_the_reason(
    model_type: str, settings: dict, why: str, recordings: list[Recording]
) -> None:
    lm = CausalLM(tiny(model_type, **settings))
    with pytest.raises(ValueError, match=rf"teacher.cuda_graphs: {type(lm.model).__name__} cannot.*{why}.*Remove it"):
        check_fixed_passes(lm, "teacher", CPU)


def test_a_model_that_asks_for_a_value_is_refused(recordings: list[Recording]) -> None:
    lm = CausalLM(tiny_llama())
    lm.model.model.norm.register_forward_hook(lambda module, inputs, output: output * (1 if output.max() < 1e9 else 2))
    with pytest.raises(
        ValueError, match="cannot decode in CUDA graphs: RuntimeError: _local_scalar_dense reads a value"
    ):
        check_fixed_passes(lm, "student", CPU)


def test_a_model_that_ignores_the_mask_is_refused() -> None:
    def blind(module: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        mask = named["attention_mask"]
        return arguments, {**named, "attention_mask": torch.ones_like(mask) if mask.dim() == 4 else mask}

    lm = CausalLM(tiny("llama"))
    lm.model.model.register_forward_pre_hook(blind, with_kwargs=True)
    with pytest.raises(ValueError, match="its hidden states differ from those without graphs"):
        check_fixed_passes(lm, "student", CPU)


@pytest.mark.parametrize("fault", ["positions", "keys", "mlp"])
def test_replays_that_differ_from_the_pass_are_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels outside of the graph would make them: what they give stays as it was when it was captured."""
    lm = CausalLM(tiny_llama())
    replaying, first = [False], {}
    update = FixedLayer.update

    def capture(work):
        def replay() -> None:
            replaying[0] = True
            work()
            replaying[0] = False

        return replay

    def once(name: str, value: Tensor) -> Tensor:
        kept = first.setdefault((name, value.shape[1]), value.clone())
        return kept if replaying[0] else value

    def stale(module: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        if named["attention_mask"].dim() == 4:
            named["position_ids"] = once("positions", named["position_ids"])
        return arguments, named

    def not_written(self: FixedLayer, *states: Tensor, **named: object) -> tuple[Tensor, Tensor]:
        return (self.keys, self.values) if replaying[0] else update(self, *states, **named)

    if fault == "positions":
        lm.model.model.register_forward_pre_hook(stale, with_kwargs=True)
    elif fault == "keys":
        monkeypatch.setattr(FixedLayer, "update", not_written)
    else:
        lm.model.model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: once("mlp", output))
    monkeypatch.setattr(fixed_passes, "Replays", lambda _: Replays(capture))
    with pytest.raises(ValueError, match="a replay gives other hidden states than the same pass without it"):
        check_fixed_passes(lm, "student", CPU)


def test_graphs_need_cuda_and_whole_models() -> None:
    specs = {"student": ModelSpec("x"), "teacher": ModelSpec("y", cuda_graphs=True)}
    check_graphs(specs, "cuda", sharded=False)
    for device, sharded, message in (
        ("cpu", False, "teacher.cuda_graphs: needs a CUDA device, but this run is on cpu. Remove it."),
        ("cuda", True, "teacher.cuda_graphs: needs whole models on each device, but trainer.strategy shards them."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_graphs(specs, device, sharded)


def test_graphs_need_sdpa_and_a_model_that_generates() -> None:
    graphs = ModelSpec("x", cuda_graphs=True)
    validate_specs(graphs, graphs)
    shared = replace(graphs, shared_with_student=True)
    validate_specs(replace(graphs, lora=LoraSpec()), shared)
    with pytest.raises(ValueError, match=r"teacher\.cuda_graphs: with shared_with_student .* expected False, not True"):
        validate_specs(ModelSpec("x", lora=LoraSpec()), shared)
    with pytest.raises(
        ValueError, match=r"student\.cuda_graphs: needs sdpa attention, but model\.student\.attn_implementation is"
    ):
        validate_specs(ModelSpec("x", cuda_graphs=True, attn_implementation="flash_attention_2"), None)
    with pytest.raises(ValueError, match=r"reference\.cuda_graphs: only student and teacher generate\. Remove it"):
        validate_specs(ModelSpec("x"), graphs, "reference")
