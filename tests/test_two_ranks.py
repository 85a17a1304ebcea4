"""Two processes learn what one learns: the same weights and the same metrics, on an odd number of validation items."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from tiny import tiny_llama

SCRIPT = """
import sys
import lightning as L, torch
from lit_distill.callbacks import ExposureBiasMonitor, GenerationEvaluator
from lit_distill.data import ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.models import LoraSpec
from lit_distill.module import DistillationModule
from lit_distill.functional import forward_kl
from lit_distill.objectives import DirectPreference, ForwardKL, JensenShannon, NextToken, PolicyGradient, ReverseKL
from lit_distill.objectives import LossTerm, Objective
from lit_distill.distributed import FSDP2Strategy, gathered
from lit_distill.sources import ResponsePairs, AdvantageConfig, StudentRollouts, TeacherMixedRollouts

class LearnedTemperature(Objective):
    def __init__(self, weight=1.0):
        super().__init__(weight)
        self.log_temperature = torch.nn.Parameter(torch.zeros(()))

    def forward(self, student_logits, teacher_logits):
        losses = forward_kl(student_logits / self.log_temperature.exp(), teacher_logits)
        return LossTerm(losses.sum(), len(losses))

untied, tied, teacher, strategy, devices, out = sys.argv[1:]
mixed = dict(max_new_tokens=10, mini_batch_size=4, inner_epochs=2, shuffle=False)
minillm = {"long": PolicyGradient(), "single": ReverseKL(importance_weighted=True)}
kd = {"kd": ForwardKL(), "ce": NextToken(weight=0.5)}
adapters = LoraSpec(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj", "lm_head"])
cases = {  # student, teacher, source, objectives, how much of it is gathered, other settings
    "sft": (untied, None, None, {"ce": NextToken()}, {}, {}),
    "kd, checkpointed and clipped": (tied, teacher, None, kd, {}, {"gradient_clip_val": 0.1}),
    "an objective that learns": (untied, teacher, None, {"kd": LearnedTemperature()}, {}, {}),
    "gkd, adapters over the teacher": (untied, untied, StudentRollouts(0.5, max_new_tokens=10), kd, {}, {}),
    "dpkd": (
        tied, teacher, ResponsePairs(max_new_tokens=10, mini_batch_size=4, inner_epochs=2, shuffle=False),
        {"dpkd": DirectPreference(beta=1.0), "ce": NextToken(weight=0.5)}, {}, {},
    ),
    "gkd": (untied, teacher, StudentRollouts(0.5, max_new_tokens=10), {"jsd": JensenShannon()}, {"gather_student": False}, {}),
    "minillm": (
        untied, teacher, TeacherMixedRollouts(alpha=0.3, scoring=AdvantageConfig(standardize="responses"), **mixed), minillm,
        {"gather_teacher": True}, {},
    ),
    "minillm, all sharded": (
        tied, teacher, TeacherMixedRollouts(alpha=0.3, **mixed), minillm, {"gather_student": False}, {},
    ),
}
together = 2 if strategy == "fsdp2, tensor-parallel" else 1
results = {}
for name, (student, expert, source, objectives, gathers, settings) in cases.items():
    L.seed_everything(1)  # of the adapters' first draw
    learner = DistillationModule(
        ModelSpec(student, gradient_checkpointing="checkpointed" in name, lora=adapters if "adapters" in name else None),
        objectives, expert and ModelSpec(expert, shared_with_student="adapters" in name), source,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), micro_batch_size=3,
    )
    callbacks = [GenerationEvaluator(max_new_tokens=10)]
    if expert and "minillm" in name:
        callbacks.append(ExposureBiasMonitor(max_prompts=3, num_samples=1, max_new_tokens=6, every_n_validations=1))
    trainer = L.Trainer(
        accelerator="cpu", devices=int(devices), max_steps=4,
        strategy=FSDP2Strategy(**gathers, tensor_parallel_size=together) if strategy.startswith("fsdp2") else strategy,
        val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, **settings,
    )
    data = ProceduralData(num_train=32, num_validation=7, num_test=5, batch_size=8, eval_batch_size=4)
    trainer.fit(learner, data)
    metrics = dict(trainer.callback_metrics)
    if name == "minillm, all sharded":
        metrics |= trainer.test(learner, data, verbose=False)[0]
    state = gathered(dict(learner.named_parameters()), keep=True)
    results[name] = {
        "weights": torch.cat([p.detach().flatten() for p in state.values()]),
        "metrics": {k: float(v) for k, v in metrics.items()},
    }
if trainer.is_global_zero:
    torch.save(results, out)
"""
CASES = [line.split('"')[1] for line in SCRIPT.splitlines() if line.startswith('    "') and ": (" in line]


@pytest.fixture(scope="module")
def students(pair: tuple[Path, Path], tmp_path_factory) -> tuple[Path, Path, Path]:
    """An untied and a tied student, and their teacher."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(5)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_llama(16, len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pair[0], folder, pair[1]


@pytest.fixture(scope="module")
def learn(students, tmp_path_factory):
    """What a strategy makes of all cases, learnt once."""
    folder = tmp_path_factory.mktemp("two_ranks")
    script = folder / "fit.py"
    script.write_text(SCRIPT)
    done: dict[str, dict] = {}

    def results(strategy: str) -> dict:
        if strategy not in done:
            ranks = 1 if strategy == "auto" else 2
            run_on_ranks(script, ranks, *students, strategy, ranks, folder / strategy)
            done[strategy] = torch.load(folder / strategy, weights_only=True)
        return done[strategy]

    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2, tensor-parallel"])
def test_two_ranks_equal_one_process_at_the_same_global_batch(learn, strategy: str, case: str) -> None:
    one, two = learn("auto")[case], learn(strategy)[case]
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-5)
    assert set(one["metrics"]) == set(two["metrics"])
    for name, value in one["metrics"].items():
        small = 1e-2 if "ex_acc_err" in name else 1e-5  # percent of a difference of two sums that are nearly equal
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=small, nan_ok=True), name
