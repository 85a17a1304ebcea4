from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

from lit_distill.models import CausalLM


@pytest.fixture
def student() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(tiny_llama())
