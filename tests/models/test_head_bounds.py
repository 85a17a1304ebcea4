"""What a model does to its logits, or to a text by what follows it, is known or refused, also where it changes little."""

from __future__ import annotations

import pytest
import torch
from architectures import RECURRENT, VOCABULARY, tiny
from tiny import tiny_llama

from lit_distill.models import CausalLM, check_head

IDS = torch.arange(24).view(2, 12) % VOCABULARY


@pytest.mark.parametrize("kind", ["recurrent_gemma", "xlstm", "gemma2"])
@torch.no_grad()
def test_logits_near_their_bound_are_the_models_own(kind: str) -> None:
    lm = CausalLM(tiny(kind, **RECURRENT.get(kind, {})))
    lm.model.get_output_embeddings().weight.mul_(30)
    own = lm.model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    assert own.abs().max() == pytest.approx(30, abs=1)
    torch.testing.assert_close(lm.head().logits(lm(IDS, torch.ones_like(IDS)).flatten(0, 1)), own, rtol=1e-4, atol=1e-4)


def test_a_bound_far_above_the_logits_is_found_too() -> None:
    model = tiny_llama()
    model.get_output_embeddings().weight.data.mul_(30)
    check_head(CausalLM(model), "model.student")
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: 30 * torch.tanh(logits / 30))
    with pytest.raises(ValueError, match=r"model\.student\.path: .* changes its logits"):
        check_head(CausalLM(model), "model.student")


def test_a_model_that_reads_in_both_directions_is_refused() -> None:
    lm = CausalLM(tiny("bert-generation", num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"model\.student\.path: BertGenerationDecoder is not causal"):
        check_head(lm, "model.student")
