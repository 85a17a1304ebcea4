"""Decoding by captured steps gives what decoding without gives. A recorder of operations stands for the CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from recording import Recording, tensors
from tiny import tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_distill.generation import Decoder, SamplingParams, decoder, generate, generate_mixed, row_uniforms
from lit_distill.generation.cached_decoder import CachedDecoder
from lit_distill.generation.decoding_batch import DecodingBatch
from lit_distill.models import CausalLM, fixed_passes
from lit_distill.models.caching import Caching
from lit_distill.models.lora import LoraSpec, add_lora
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Prompts, Responses

STOPS = (3, 4)
T = 60


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Records steps wherever CUDA graphs would be captured; returns one recording per decoder."""
    made: list[CachedDecoder] = []
    recordings: list[Recording] = []
    own = CachedDecoder.__init__

    def remember(self: CachedDecoder, *arguments: object, **named: object) -> None:
        own(self, *arguments, **named)
        made.append(self)

    def recording(device: torch.device) -> Recording:
        recordings.append(Recording(lambda: (tensor for each in made for tensor in lasting(each))))
        return recordings[-1]

    monkeypatch.setattr(CachedDecoder, "__init__", remember)
    monkeypatch.setattr(decoder, "CudaCapture", recording)
    monkeypatch.setattr(fixed_passes, "READ_COLUMNS", 16)
    return recordings


def lasting(decoder: CachedDecoder) -> Iterator[Tensor]:
    """What a decoder, its batch, its passes and its model hold."""
    lm = getattr(decoder.model, "lm", decoder.model)
    holders = [vars(decoder), vars(decoder.batch), decoder.head._asdict()]
    if decoder.passes is not None:
        holders += [vars(decoder.passes), *(vars(layer) for layer in decoder.passes.layers)]
    yield from (value for holder in holders for value in holder.values() if isinstance(value, Tensor))
    yield from lm.parameters()
    yield from lm.buffers()


def model(layers: int, seed: int) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(tiny_llama(num_hidden_layers=layers, max_position_embeddings=128))


def with_graphs(lm: CausalLM) -> CausalLM:
    lm.cuda_graphs = True
    return lm


def prompts(rows: int = 6) -> Prompts:
    lengths = torch.arange(rows) % 5 + 3
    ids = torch.randint(5, 41, (rows, 7))
    return Prompts(ids, (torch.arange(7) >= 7 - lengths[:, None]).long())


def uniforms(rows: int) -> Tensor:
    return row_uniforms(0, [str(row) for row in range(rows)], T)


def assert_same(found: Responses, expected: Responses) -> None:
    for name, own in vars(expected).items():
        value = getattr(found, name)
        if own is None or own.dtype in (torch.bool, torch.int64):
            assert value is own or torch.equal(value, own), name
            continue
        mask = expected.mask[..., None] if own.dim() == 3 else expected.mask  # hidden states after the end mean nothing
        torch.testing.assert_close(value * mask, own * mask, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(T), SamplingParams(T, temperature=0.7, top_k=9, top_p=0.8), SamplingParams(T, temperature=0)],
    ids=["all tokens", "truncated", "greedy"],
)
def test_one_model_generates_the_same(sampling: SamplingParams, recordings: list[Recording]) -> None:
    texts, numbers = prompts(), uniforms(6)
    expected = generate(model(2, 0), texts, sampling, STOPS, numbers)
    assert not recordings
    assert expected.mask.sum(dim=-1).unique().numel() > 1
    assert_same(generate(with_graphs(model(2, 0)), texts, sampling, STOPS, numbers), expected)
    assert recordings[0].replays > 20


def test_most_steps_are_replays_of_a_few(recordings: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_passes, "READ_COLUMNS", 32)
    lm = with_graphs(model(2, 0))
    forwards: list[Tensor] = []
    lm.register_forward_hook(lambda *_: forwards.append(1))
    generate(lm, prompts(), SamplingParams(T), (), uniforms(6))
    # 68 columns are read as 32, 64 and 72: each width runs once as it is and once in its capture; the first step is the prompt's
    assert (recordings[0].captures, recordings[0].replays) == (3, T - 1 - 3)
    tests_of_the_cache = 4
    assert len(forwards) == tests_of_the_cache + 1 + 2 * 3


@pytest.mark.parametrize("graphs", ["student", "teacher", "both"])
def test_two_models_generate_and_record_the_same(
    graphs: str, recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, numbers = prompts(), uniforms(6)
    monkeypatch.setattr(fixed_passes, "READ_COLUMNS", 64)
    runs = [(torch.rand(T, generator=torch.Generator().manual_seed(seed)) < 0.3).tolist() for seed in (1, 2)]
    for use_teacher in runs:
        expected = generate_mixed(
            model(2, 0), FrozenTeacher(model(3, 1)), use_teacher, texts, SamplingParams(T), STOPS, numbers
        )
        student, teacher = model(2, 0), model(3, 1)
        student.cuda_graphs, teacher.cuda_graphs = graphs != "teacher", graphs != "student"
        found = generate_mixed(student, FrozenTeacher(teacher), use_teacher, texts, SamplingParams(T), STOPS, numbers)
        assert_same(found, expected)
    assert sum(recording.replays for recording in recordings) > 5


@pytest.mark.parametrize("every", [3, 7, 13, 17])
def test_a_model_that_samples_now_and_then_catches_up_by_replays(every: int, recordings: list[Recording]) -> None:
    texts, numbers = prompts(), uniforms(6)
    use_teacher = [step % every == every - 1 for step in range(T)]
    results = []
    for graphs in (False, True):
        student, teacher = model(2, 0), model(3, 1)
        student.cuda_graphs = teacher.cuda_graphs = graphs
        results.append(
            generate_mixed(student, FrozenTeacher(teacher), use_teacher, texts, SamplingParams(T), (), numbers)
        )
    assert_same(results[1], results[0])
    assert len(recordings) == 1


def test_adapters_and_the_base_below_them_have_steps_of_their_own(tmp_path, recordings: list[Recording]) -> None:
    texts, numbers = prompts(), uniforms(6)
    use_teacher = [step % 3 == 0 for step in range(T)]
    results = []
    for graphs in (False, True):
        lm = model(2, 0)
        add_lora(lm.model, LoraSpec(r=2), "student.lora")
        torch.manual_seed(2)
        for name, parameter in lm.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter)
        lm.cuda_graphs = graphs
        teacher = FrozenTeacher(lm, shared=True)
        results.append(generate_mixed(lm, teacher, use_teacher, texts, SamplingParams(T), STOPS, numbers))
    assert_same(results[1], results[0])
    assert recordings[0].replays > 20


def test_a_step_asks_nothing_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, whose tensors have no values: whatever reads one or copies a number to it is seen."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    meta = torch.device("meta")
    lm = with_graphs(model(2, 0)).to(meta)
    lm.caching = Caching(True)
    ids = torch.empty(4, 7, dtype=torch.int64, device=meta)
    sampling = SamplingParams(T, temperature=0.7, top_k=9, top_p=0.8)
    batch = DecodingBatch(Prompts(ids, torch.ones_like(ids)), sampling, STOPS, torch.empty(4, T, device=meta))
    with torch.no_grad(), lm.eval_mode():
        decoder = CachedDecoder(lm, batch, True, True, lambda work: work)
        lm(ids, torch.ones(4, 1, 7, 7, dtype=torch.bool, device=meta), decoder.cache, ids)  # asks for no mask
        decoder.hidden = torch.empty(4, T, 16, device=meta)
        decoder.num_cached = 20
        for layer in decoder.cache.layers:
            layer.set_length(7 + 20)
        with OnlyOn(meta) as watch:
            for step in (21, 22, 23, 27):
                decoder.advance(step)
    assert watch.operations > 100


class OnlyOn(TorchDispatchMode):
    """Refuses operations on tensors of other devices.

    Args:
        device: the one that is allowed.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operations = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        self.operations += 1
        others = [each for each in tensors((arguments, named, result)) if each.device != self.device]
        assert not others, operation
        return result


def test_rows_leave_once_half_of_them_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def on_step(step: int, steps: int, rows: int) -> None:
        sizes.append(rows)

    texts, keys = prompts(32), [str(row) for row in range(32)]
    responses = Decoder(with_graphs(model(2, 0)), STOPS, on_step=on_step).generate(texts, keys, SamplingParams(T), 0)
    left = sorted(set(sizes) - {0}, reverse=True)
    assert left[0] == 32
    assert len(left) > 2
    assert all(2 * fewer <= more for more, fewer in pairwise(left))
    assert_same(responses, generate(model(2, 0), texts, SamplingParams(T), STOPS, uniforms(32)))


def test_autocast_and_16_bit_weights_are_kept(recordings: list[Recording]) -> None:
    texts, numbers = prompts(), uniforms(6)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for graphs in (False, True):
            lm = model(2, 0).to(dtype)
            lm.cuda_graphs = graphs
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                results.append(generate(lm, texts, SamplingParams(T), STOPS, numbers))
        same = (results[0].ids[:, :9] == results[1].ids[:, :9]).float().mean()
        assert same > 0.9  # 16-bit rounding moves some numbers across the border between two tokens
