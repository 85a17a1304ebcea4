"""The chunked head computes what the plain head computes, for any chunk, and lets nothing of size [N, V] live."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_distill.functional import forward_kl
from lit_distill.losses import ChunkedTokenLoss, ObjectiveEvaluator
from lit_distill.models import LMHead
from lit_distill.objectives import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    LossTerm,
    NextToken,
    Objective,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from lit_distill.teachers import FrozenTeacher, HiddenRows

N, H, V = 23, 8, 31


class LabelMargin(Objective):
    """An objective as a user might write it, with a parameter of its own and a count that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> LossTerm:
        margin = student_logits.amax(dim=-1) - student_logits.gather(-1, labels[:, None])[:, 0]
        sure = teacher_logits.softmax(dim=-1).amax(dim=-1) > 0.1
        return LossTerm((self.scale * margin * sure).sum(), sure.sum(), {"margin": margin.detach().sum()})


ALL = {
    "ce": NextToken,
    "fkl": ForwardKL,
    "rkl": ReverseKL,
    "jsd": JensenShannon,
    "skl": SkewForwardKL,
    "srkl": SkewReverseKL,
    "tv": TotalVariation,
    "akl": AdaptiveKL,
    "own": LabelMargin,
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.25},
    "all": {"bias": True, "softcap": 3.0, "scale": 1.7},
}


def problem(bias: bool = False, **head) -> tuple[Tensor, LMHead, dict[str, Tensor], tuple[Tensor, LMHead]]:
    hidden = torch.randn(N, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    offset = torch.randn(V, requires_grad=True) if bias else None
    teacher = HiddenRows(torch.randn(N, H + 3), LMHead(torch.randn(V, H + 3)))
    return hidden, LMHead(weight, offset, **head), {"labels": torch.randint(0, V, (N,))}, teacher


def plain_loss(objectives, factors, hidden, head: LMHead, signals, teacher) -> Tensor:
    """Everything at once, by autograd, without `ChunkedTokenLoss`."""
    logits = head.scale * F.linear(hidden, head.weight, head.bias)
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    available = {"student_logits": logits, "teacher_logits": F.linear(teacher[0], teacher[1].weight), **signals}
    return sum(factors[n] * o(**{s: available[s] for s in o.needs}).total for n, o in objectives.items())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ALL)
def test_value_and_gradients_equal_the_plain_computation_for_every_chunk_size(name: str, head: str) -> None:
    hidden, projection, signals, teacher = problem(**HEADS[head])
    objectives, factors = {name: ALL[name](), "ce2": NextToken()}, {name: 0.37, "ce2": 0.011}
    inputs = [x for x in (hidden, projection.weight, projection.bias, *objectives[name].parameters()) if x is not None]
    expected = plain_loss(objectives, factors, hidden, projection, signals, teacher)
    gradients = torch.autograd.grad(expected, inputs)
    for chunk_rows in (1, 2, 7, N - 1, N, N + 5):
        loss = ChunkedTokenLoss(objectives, factors, projection, signals, teacher, chunk_rows)(hidden)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(torch.autograd.grad(loss, inputs), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_gradient_scales_with_what_comes_after_the_loss() -> None:
    hidden, head, signals, teacher = problem()
    objectives = {"fkl": ForwardKL()}
    (once,) = torch.autograd.grad(ChunkedTokenLoss(objectives, {"fkl": 1.0}, head, signals, teacher, 5)(hidden), hidden)
    (thrice,) = torch.autograd.grad(
        3 * ChunkedTokenLoss(objectives, {"fkl": 1.0}, head, signals, teacher, 5)(hidden), hidden
    )
    torch.testing.assert_close(thrice, 3 * once)


def test_without_gradient_the_value_and_the_sums_are_the_same() -> None:
    hidden, head, signals, teacher = problem(bias=True, softcap=2.0)
    objectives, factors = {"fkl": ForwardKL(), "own": LabelMargin()}, {"fkl": 1.0, "own": 2.0}
    with_gradient = ChunkedTokenLoss(objectives, factors, head, signals, teacher, 4)
    without = ChunkedTokenLoss(objectives, factors, head, signals, teacher, 9)
    value = with_gradient(hidden)
    with torch.no_grad():
        torch.testing.assert_close(without(hidden), value.detach())
    for name in objectives:
        torch.testing.assert_close(without.terms[name].total, with_gradient.terms[name].total)
        assert int(without.terms[name].count) == int(with_gradient.terms[name].count)
        assert not with_gradient.terms[name].total.requires_grad


def test_bf16_autocast_gives_the_plain_autocast_computation(monkeypatch) -> None:
    monkeypatch.setattr("lit_distill.models.lm_head.product_dtype", lambda dtype, _: dtype)  # also where it is emulated
    hidden, head, signals, teacher = problem(bias=True)
    teacher_logits = teacher[1].logits(teacher[0])  # the teacher keeps its own dtype
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, head.weight, head.bias)
        assert logits.dtype == torch.bfloat16
        expected = forward_kl(logits.float(), teacher_logits).sum()
        loss = ChunkedTokenLoss({"fkl": ForwardKL()}, {"fkl": 1.0}, head, signals, teacher, 6)(hidden)
    inputs = [hidden, head.weight, head.bias]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert loss.dtype == torch.float32
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # bf16 has eight bits


def test_no_rows_give_a_zero_loss_and_zero_gradients() -> None:
    hidden, head, signals, teacher = problem()
    empty = {name: signal[:0] for name, signal in signals.items()}
    loss = ChunkedTokenLoss(
        {"fkl": ForwardKL(), "ce": NextToken()},
        {"fkl": 1.0, "ce": 1.0},
        head,
        empty,
        HiddenRows(teacher.hidden[:0], teacher.head),
    )(hidden[:0])
    assert float(loss.detach()) == 0.0
    assert not any(g.any() for g in torch.autograd.grad(loss, [hidden, head.weight]))


def test_an_objective_that_ignores_the_student_is_refused() -> None:
    class TeacherEntropy(Objective):
        def forward(self, teacher_logits: Tensor) -> LossTerm:
            return LossTerm(teacher_logits.sum(), len(teacher_logits))

    hidden, head, signals, teacher = problem()
    with pytest.raises(ValueError, match=r"^objectives\.entropy: the total does not depend on the student"):
        ChunkedTokenLoss({"entropy": TeacherEntropy()}, {"entropy": 1.0}, head, signals, teacher)(hidden)


class LiveLogits(TorchDispatchMode):
    """Records the largest tensor that ends in V made at all, and how many values of such tensors live at one time."""

    def __init__(self, vocabulary: int, weight_rows: int) -> None:
        super().__init__()
        self.vocabulary, self.weight_rows = vocabulary, weight_rows
        self.live: dict[int, int] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if (
                isinstance(tensor, Tensor)
                and tensor.ndim
                and tensor.shape[-1] == self.vocabulary
                and len(tensor) != self.weight_rows
            ):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = tensor.numel()
                    weakref.finalize(tensor, self.live.pop, storage._cdata, None)
                self.largest = max(self.largest, tensor.numel())
                self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("objective", [ForwardKL, AdaptiveKL, LabelMargin])
def test_nothing_of_size_tokens_times_vocabulary_is_ever_allocated_or_outlives_a_chunk(
    objective: type[Objective],
) -> None:
    rows, vocabulary, chunk_rows = 1024, 257, 16
    hidden = torch.randn(rows, H, requires_grad=True)
    head, teacher = (
        LMHead(torch.randn(vocabulary, H, requires_grad=True)),
        HiddenRows(torch.randn(rows, H), LMHead(torch.randn(vocabulary, H))),
    )
    signals = {"labels": torch.randint(0, vocabulary, (rows,))}
    gc.collect()
    with LiveLogits(vocabulary, weight_rows=H) as allocations:
        loss = ChunkedTokenLoss({"o": objective()}, {"o": 1.0}, head, signals, teacher, chunk_rows)(hidden)
        gc.collect()
        after_forward = sum(allocations.live.values())
        loss.backward()
    assert 0 < allocations.largest <= chunk_rows * vocabulary
    assert (
        allocations.peak <= 40 * chunk_rows * vocabulary < rows * vocabulary
    )  # a chunk's own temporaries, never the sum of chunks
    assert after_forward == 0


def test_one_student_and_one_teacher_projection_and_two_gradient_products_per_chunk() -> None:
    hidden, head, signals, teacher = problem()

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return func(*args, **(kwargs or {}))

    with Products() as products:
        ChunkedTokenLoss({"fkl": ForwardKL(), "ce": NextToken()}, {"fkl": 1.0, "ce": 1.0}, head, signals, teacher, N)(
            hidden
        ).backward()
    assert products.count == 4


def test_the_teacher_does_not_run_unless_an_objective_asks_for_it(student, teacher: FrozenTeacher, text) -> None:
    calls = []
    teacher.lm.register_forward_pre_hook(lambda *_: calls.append(1))
    ObjectiveEvaluator({"ce": NextToken()}, student, teacher, "model.objectives")(text, {"ce": 1.0})
    assert not calls
    ObjectiveEvaluator({"kd": ForwardKL()}, student, teacher, "model.objectives")(text, {"kd": 1.0})
    assert len(calls) == 1
