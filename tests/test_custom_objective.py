"""The objective that the README shows works from a file of the user's own, by its import path."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from command_line import main, tiny_config, write
from lightning.pytorch import Callback, Trainer

from lit_distill.data import ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import LossTerm, NextToken, Objective

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    """The first block of Python in the README that defines an objective."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if re.search(r"class \w+\(Objective\)", block))


def test_the_readmes_objective_trains(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # As in a console script: the folder one works in is not on the path before `main` puts it there.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    (tmp_path / "objective_of_mine.py").write_text(example(), encoding="utf-8")
    (name,) = re.findall(r"class (\w+)\(Objective\)", example())
    own = {"class_path": f"objective_of_mine.{name}", "init_args": {"threshold": 0.0}}  # the teacher is random
    config = tiny_config(pair, objectives={"own": own})
    main("fit", "--config", write(config, tmp_path / "own.yaml"), "--export.enabled", "false")
    (log,) = (tmp_path / "runs").rglob("metrics.csv")
    assert "train/own" in log.read_text().splitlines()[0]
    monkeypatch.delitem(sys.modules, "objective_of_mine")
    assert len(example().splitlines()) <= 30


class OfNothing(Objective):
    """Leaves out every token of the first two steps."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.steps = 0

    def forward(self, student_logits, labels) -> LossTerm:
        kept = torch.full_like(labels, self.steps >= 2, dtype=torch.bool)
        return LossTerm((student_logits.logsumexp(-1) * kept).sum(), kept.sum())


def test_an_objective_that_counts_nothing_is_named_once(pair, tmp_path) -> None:
    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            pl_module.objectives["none"].steps += 1

    module = DistillationModule(ModelSpec(str(pair[0])), {"none": OfNothing(), "ce": NextToken()})
    trainer = Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, log_every_n_steps=1,
        limit_val_batches=0, enable_model_summary=False, callbacks=[Count()],
    )  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"model\.objectives\.none: it counted no item in step 1, so it taught nothing"
    ) as said:
        trainer.fit(module, ProceduralData(num_train=48, num_validation=4, num_test=4, batch_size=8))
    assert len([one for one in said if "counted no item" in str(one.message)]) == 1


def test_an_objective_that_forgets_its_base_class_is_named() -> None:
    class Forgets(Objective):
        def __init__(self) -> None:
            self.threshold = 0.5

        def forward(self, student_logits, labels) -> LossTerm: ...

    words = r"^objectives\.own: the constructor of Forgets does not call super\(\)\.__init__\(weight\)"
    with pytest.raises(ValueError, match=words):
        DistillationModule(ModelSpec("none"), {"own": Forgets()})
