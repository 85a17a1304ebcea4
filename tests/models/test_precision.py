"""What `auto` stands for on a processor with and without units for bfloat16, and that emulated products do not run."""

from __future__ import annotations

import platform
import resource
import sys

import pytest
import torch
from command_line import run, tiny_config, write
from tiny import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from lit_distill.losses import ChunkedTokenLoss
from lit_distill.models import CausalLM, LMHead, ModelSpec
from lit_distill.models import precision as of
from lit_distill.models.roles import resolve_dtype, warn_of_emulation
from lit_distill.objectives import ForwardKL
from lit_distill.teachers import FrozenTeacher, HiddenRows


@pytest.fixture(params=[True, False], ids=["with units", "without"])
def units(request, monkeypatch) -> bool:
    """A processor that has units for bfloat16, and one that has not."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": request.param}, raising=False)
    of.multiplies_fast.cache_clear()
    yield request.param
    of.multiplies_fast.cache_clear()


class Products(TorchDispatchMode):
    """Notes the dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def test_auto_is_what_the_processor_multiplies_fast(units) -> None:
    assert of.auto_precision("cpu") == ("bf16-mixed" if units else "32-true")
    student = resolve_dtype(ModelSpec("s", dtype="auto"), "student", "cpu", trained=True)
    teacher = resolve_dtype(ModelSpec("t", dtype="auto"), "teacher", "cpu")
    assert student.dtype == "float32"  # its weights train
    assert teacher.dtype == ("bfloat16" if units else "float32")


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_where_torch_does_not_know_the_processor_a_product_is_timed(monkeypatch, seconds: float) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(of, "_time_of_product", {torch.bfloat16: seconds, torch.float32: 1.0}.get)
    of.multiplies_fast.cache_clear()
    assert of.multiplies_fast(torch.bfloat16, "cpu") == (seconds < 1.0)
    of.multiplies_fast.cache_clear()


def test_a_product_takes_time() -> None:
    assert 0 < of._time_of_product(torch.float32) < 10


def test_the_head_multiplies_in_float32_where_bfloat16_is_emulated(units) -> None:
    torch.manual_seed(0)
    student, teacher = (LMHead(torch.randn(40, 8, dtype=torch.bfloat16, requires_grad=i == 0)) for i in range(2))
    hidden = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    teacher_hidden = torch.randn(6, 8, dtype=torch.bfloat16)
    signals = {"labels": torch.zeros(6, dtype=torch.int64)}
    loss = ChunkedTokenLoss(
        {"kd": ForwardKL()}, {"kd": 1.0}, student, signals, HiddenRows(teacher_hidden, teacher.for_products())
    )
    with Products() as products:
        value = loss(hidden)
        value.backward()
    assert products.dtypes == ({torch.bfloat16} if units else {torch.float32})
    assert hidden.grad.dtype == student.weight.grad.dtype == torch.bfloat16
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, student.weight))
    q = (exact_hidden @ exact_weight.T).log_softmax(-1)
    p = (teacher_hidden.double() @ teacher.weight.double().T).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    exact.backward()
    tolerance = 5e-2 if units else 1e-5  # bfloat16 rounds the logits; float32 does not
    torch.testing.assert_close(value.double(), exact.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=5e-2, atol=5e-2)


def test_a_run_that_asks_for_emulated_numbers_is_told_the_keys(units, caplog) -> None:
    student, teacher = CausalLM(tiny_llama()), FrozenTeacher(CausalLM(tiny_llama(hidden=24).bfloat16())).lm
    with caplog.at_level("INFO"):
        warn_of_emulation(teacher, "teacher", "cpu")
        warn_of_emulation(student, "student", "cpu", "bf16-mixed")
    told = [record.getMessage().split(":")[0] for record in caplog.records]
    assert told == ([] if units else ["model.teacher.dtype", "trainer.precision"])


def test_the_command_line_takes_auto_and_says_what_it_is(pair, tmp_path, units, caplog) -> None:
    config = tiny_config(pair)
    config["trainer"]["precision"] = "auto"
    with caplog.at_level("INFO"):
        cli = run("--config", write(config, tmp_path / "auto.yaml"), run=False)
    assert cli.trainer.precision == ("bf16-mixed" if units else "32-true")
    assert f"trainer.precision: auto is {cli.trainer.precision} on this cpu." in caplog.text


def test_attention_of_cudnn_is_left_out_on_a_gpu_but_where_no_gradient_is_taken() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        of.avoid_cudnn_attention("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        of.avoid_cudnn_attention("cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        with of.forward_only("cuda"), of.forward_only("cuda"):
            assert torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_chunk() -> None:
    def page_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            parts = [torch.empty(7 * 2**20).fill_(1) for _ in range(4)]
            del parts
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    of.keep_freed_memory("cpu")
    page_faults()
    assert page_faults() < 4 * 7 * 2**20 // 1024  # pages of one round
