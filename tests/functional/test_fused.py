"""The Triton kernel computes what the formulas compute, in Triton's interpreter; `tools/gpu_check.py` compares both on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="PyTorch for CUDA brings Triton; on a CPU: pip install triton")

SCRIPT = """
import json, torch
from functools import partial
from lit_distill.functional import closed_form, divergences, fused

fused.TILE = 32  # several tiles a row, the last one not full
numbers = torch.Generator().manual_seed(0)
worst = {}


def value_and_gradient(function, student, teacher, by_kernel):
    closed_form.runs_fused = lambda logits: by_kernel
    value = function(student.requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(value[value.isfinite()].sum(), student)
    assert value.dtype == torch.float32 and gradient.dtype == student.dtype
    return value, gradient.double()


for vocabulary in (1, 7, 64, 100):
    student, teacher = (3 * torch.randn(5, vocabulary, generator=numbers) for _ in range(2))
    if vocabulary > 7:
        student[1, ::3] = teacher[1, ::3] = -torch.inf  # impossible for both
        student[2, 5], teacher[3, 5] = -torch.inf, -torch.inf  # for one
        student[4] = teacher[4]
    for dtype in (torch.float32, torch.bfloat16):
        for temperature in (1.0, 2.5):
            for name in fused.KINDS:
                share = {"beta": 0.3} if name == "jensen_shannon" else {"skew": 0.3} if "skew" in name else {}
                function = partial(getattr(divergences, name), temperature=temperature, **share)
                logits = student.to(dtype), teacher.to(dtype)
                expected, expected_gradient = value_and_gradient(function, *logits, by_kernel=False)
                value, gradient = value_and_gradient(function, *logits, by_kernel=True)
                assert torch.equal(value.isinf(), expected.isinf()), (name, value, expected)
                finite = value.isfinite()
                differences = (value - expected)[finite].abs().max(), (gradient - expected_gradient).abs().max()
                key = f"{name} {str(dtype)[6:]}"
                worst[key] = max(worst.get(key, 0.0), *map(float, differences))
print(json.dumps(worst))
"""


def test_the_kernel_gives_values_and_gradients_of_the_formulas() -> None:
    process = subprocess.run(
        [sys.executable, "-c", "import os; os.environ['TRITON_INTERPRET'] = '1'" + SCRIPT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    worst = json.loads(process.stdout)
    assert len(worst) == 14
    for name, error in worst.items():
        assert error < (2e-2 if "bfloat16" in name else 2e-5), (name, error)
