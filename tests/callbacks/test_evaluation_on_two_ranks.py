"""Two processes measure what one measures: generated text, exposure bias and sampled responses, on an odd number of prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run_on_ranks

SCRIPT = """
import json, sys
import lightning as L
from lit_distill.callbacks import ExposureBiasMonitor, GenerationEvaluator, OnPolicyEvaluator
from lit_distill.data import ProceduralData
from lit_distill.evaluation import Checker
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL

class EvenLength(Checker):
    def __call__(self, response, references):
        return float(len(response) % 2 == 0)

student, teacher, devices, out = sys.argv[1:]
results = []
for max_prompts in (-1, 5):
    callbacks = [
        GenerationEvaluator(
            max_prompts, max_new_tokens=6, temperature=1.0, seeds=[1, 2], reference_lengths=[2], checker=EvenLength()
        ),
        ExposureBiasMonitor(max_prompts, num_samples=2, max_new_tokens=6, lengths=[1, 6]),
        OnPolicyEvaluator(max_prompts, num_responses=3, k=[1, 2], max_new_tokens=6, checker=EvenLength()),
    ]
    trainer = L.Trainer(
        accelerator="cpu", devices=int(devices), strategy="ddp" if devices == "2" else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )
    learner = DistillationModule(ModelSpec(student), {"kd": ForwardKL()}, ModelSpec(teacher))
    trainer.test(learner, ProceduralData(num_train=8, num_validation=4, num_test=9, eval_batch_size=4), verbose=False)
    figures = {k: float(v) for k, v in trainer.callback_metrics.items()}
    sections = callbacks[1].report()["exposure_bias"], [b["count"] for b in callbacks[0].report()["generation"][0]["buckets"]]
    results.append((figures, *sections))
if trainer.is_global_zero:
    json.dump(results, open(out, "w"))
"""


@pytest.mark.slow
def test_two_ranks_equal_one_on_all_prompts_and_on_some(pair: tuple[Path, Path], tmp_path) -> None:
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    results = []
    for devices in (1, 2):  # the last batch has one item, so a rank has none
        out = tmp_path / f"{devices}.json"
        run_on_ranks(script, devices, *pair, devices, out)
        results.append(json.loads(out.read_text()))
    for (figures, bias, buckets), (others, other_bias, other_buckets) in zip(*results, strict=True):
        assert set(figures) == set(others)
        for name, value in figures.items():
            percent = "ex_acc_err" in name  # a quotient of float32 sums, whose rounding depends on the padding
            assert others[name] == pytest.approx(value, rel=1e-4, abs=1e-3 if percent else 1e-5, nan_ok=True), name
        for name, value in bias.items():
            assert other_bias[name] == pytest.approx(value, rel=1e-4, abs=1e-3), name
        assert other_buckets == buckets
    everything, some = results[0]
    assert (everything[1]["num_prompts"], sum(everything[2])) == (9, 9)
    assert (some[1]["num_prompts"], sum(some[2])) == (5, 5)  # two of each batch of four, one of one
    for metrics, *_ in results[0]:
        assert {"test/pass_at_2", "test/mean_at_3", "test/top_k_overlap", "test/teacher_answer_accuracy"} <= set(
            metrics
        )
        assert 0 < metrics["test/pass_at_1"] < metrics["test/pass_at_2"] < 100
