"""The routers' auxiliary loss is not trained, and the user of a mixture of experts is told so."""

from __future__ import annotations

import logging

import pytest
import torch
from architectures import VOCABULARY, tiny
from tiny import tiny_llama
from training import learner_of, quiet_trainer

from lit_distill.data import ProceduralData
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM
from lit_distill.models.routers import note_on_routers
from lit_distill.objectives import NextToken
from lit_distill.types import Sequences


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_what_is_trained_is_the_models_own_loss_without_the_routers(kind: str) -> None:
    model = tiny(kind, output_router_logits=True, router_aux_loss_coef=0.5)
    ids = torch.randint(3, VOCABULARY, (3, 9))
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    measure = ObjectiveEvaluator({"ce": NextToken()}, CausalLM(model), None, "model.objectives")
    loss, terms = measure(Sequences(ids, torch.ones_like(ids), targets), {"ce": 1.0})
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
    torch.testing.assert_close(loss / terms["ce"].count, own.loss - 0.5 * own.aux_loss, rtol=1e-4, atol=1e-5)
    assert own.aux_loss > 0.1
    note = note_on_routers(model.config)
    assert note is not None
    assert "router_aux_loss_coef: 0.5 in its config). This loss is not used" in note


@pytest.mark.parametrize(
    "model", [tiny_llama(), tiny("mixtral", router_aux_loss_coef=0.0)], ids=["dense", "switched off"]
)
def test_who_has_no_such_loss_hears_nothing(model) -> None:
    assert note_on_routers(model.config) is None


@pytest.mark.parametrize("experts", [True, False])
def test_a_run_says_it_once_at_its_start(pair, tmp_path, caplog, experts: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

    student = pair[0]
    if experts:
        tokenizer, student = AutoTokenizer.from_pretrained(pair[0]), tmp_path / "experts"
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=2, **sizes)
        config.eos_token_id = tokenizer.eos_token_id
        AutoModelForCausalLM.from_config(config).save_pretrained(student)
        tokenizer.save_pretrained(student)
    learner = learner_of((student, pair[1]), {"ce": NextToken()})
    with caplog.at_level(logging.INFO):
        quiet_trainer(tmp_path, 2).fit(
            learner, ProceduralData(num_train=16, num_validation=4, num_test=4, batch_size=8)
        )
    assert caplog.text.count("auxiliary load-balancing loss") == experts
