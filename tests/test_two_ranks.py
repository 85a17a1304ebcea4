"""Two processes learn what one learns: the same weights and the same figures, on an odd number of validation items."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import lightning as L, torch
from lit_distill.callbacks import GenerationEvaluator
from lit_distill.data import ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL, NextToken, PolicyGradient, ReverseKL
from lit_distill.rollouts import Scoring, TeacherMixedRollouts

student, teacher, method, devices, out = sys.argv[1:]
mixed = TeacherMixedRollouts(
    alpha=0.3, max_new_tokens=8, mini_batch_size=4, inner_epochs=2, shuffle=False, scoring=Scoring(standardize="responses")
)
source, objectives = {
    "kd": (None, {"kd": ForwardKL(), "ce": NextToken(weight=0.5)}),
    "minillm": (mixed, {"long": PolicyGradient(), "single": ReverseKL(importance_weighted=True)}),
}[method]
learner = DistillationModule(
    ModelSpec(student), objectives, ModelSpec(teacher), source,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), micro_batch_size=2,
)
trainer = L.Trainer(
    accelerator="cpu", devices=int(devices), strategy="ddp" if devices == "2" else "auto", max_steps=4, val_check_interval=2,
    check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[GenerationEvaluator(max_new_tokens=4)],
)
trainer.fit(learner, ProceduralData(num_train=32, num_validation=7, num_test=4, batch_size=8, eval_batch_size=4))
if trainer.is_global_zero:
    weights = torch.cat([p.detach().flatten() for p in learner.student.parameters()])
    torch.save({"weights": weights, "figures": {k: float(v) for k, v in trainer.callback_metrics.items()}}, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "minillm"])
def test_two_ranks_equal_one_process_at_the_same_global_batch(pair: tuple[Path, Path], tmp_path, method: str) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    results = []
    for devices in ("1", "2"):
        out = tmp_path / f"{devices}.pt"
        command = [sys.executable, "-W", "ignore", str(script), *map(str, pair), method, devices, str(out)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(out, weights_only=True))
    one, two = results
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-5)
    assert set(one["figures"]) == set(two["figures"])
    for name, value in one["figures"].items():
        assert two["figures"][name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
