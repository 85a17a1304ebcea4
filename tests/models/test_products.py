"""Products of the head: the same numbers from either library."""

from __future__ import annotations

import pytest
import torch

from lit_distill.models import products


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_both_libraries_give_the_product(rows: int, onednn: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "_prefers_onednn", lambda: onednn)
    numbers = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 32, generator=numbers)
    weight = torch.randn(products.MANY_OUTPUTS, 32, generator=numbers)
    shift = torch.randn(products.MANY_OUTPUTS, generator=numbers) if bias else None
    expected = hidden.double() @ weight.double().T + (0 if shift is None else shift.double())
    torch.testing.assert_close(products.linear(hidden, weight, shift).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("described", "vendor"),
    [("processor : 0\nvendor_id\t: AuthenticAMD\n", "AuthenticAMD"), ("processor : 0\nCPU part : 0xd40\n", None)],
)
def test_the_vendor_is_read_where_the_system_tells_it(
    described: str, vendor: str | None, tmp_path, monkeypatch
) -> None:
    (tmp_path / "cpuinfo").write_text(described)
    monkeypatch.setattr(products, "Path", lambda _: tmp_path / "cpuinfo")
    assert products._vendor() == vendor
