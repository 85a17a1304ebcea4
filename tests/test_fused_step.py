"""Adam and AdamW take one pass over a weight unless the user or the device says otherwise; the numbers stay the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from lit_distill.optim import configure_optimizer


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    numbers = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=numbers).to(device)) for size in ((5, 3), (3,))]


def configured(optimizer: Any, weights: list[nn.Parameter], **given: Any) -> Any:
    return configure_optimizer(optimizer, None, weights, lambda: 10, **given)


@pytest.mark.parametrize(
    ("optimizer", "device", "given", "fused"),
    [
        (AdamW, "cpu", {}, True),
        (Adam, "cpu", {}, True),
        (AdamW, "meta", {}, None),
        (AdamW, "cpu", {"scales_gradients": True}, None),
        (partial(AdamW, fused=False), "cpu", {}, False),
        (partial(AdamW, foreach=False), "cpu", {}, None),
        (partial(AdamW, differentiable=True), "cpu", {}, None),
        (partial(SGD, lr=0.1), "cpu", {}, None),
    ],
)
def test_where_the_step_is_fused(optimizer: Any, device: str, given: dict[str, Any], fused: bool | None) -> None:
    groups = configured(optimizer, parameters(device), **given).param_groups
    assert [group["fused"] for group in groups] == [fused, fused]


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_a_fused_step_gives_the_weights_of_the_plain_one(kind: Any) -> None:
    both = []
    for fused in (None, False):
        weights = parameters()
        optimizer = configured(partial(kind, lr=0.05, fused=fused), weights)
        for step in range(5):
            for weight in weights:
                weight.grad = torch.sin(weight.detach() + step)
            optimizer.step()
        both.append(weights)
    for fused_weight, plain in zip(*both, strict=True):
        torch.testing.assert_close(fused_weight, plain, rtol=1e-6, atol=1e-7)
