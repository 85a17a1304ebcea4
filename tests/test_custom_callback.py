"""The callback that the README shows works from a file of the user's own, and sees what the module says it does."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from command_line import main, tiny_config, write

from lit_distill.data import ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL, NextToken

README = Path(__file__).parents[1] / "callbacks" / "README.md"
NUM_PHASES, STEPS_PER_PHASE = 2, 2


def example() -> str:
    """The first block of Python in the README of the callbacks."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[0]


@pytest.fixture
def run(pair, tmp_path, monkeypatch):
    """Fit with the README's callback; gives its lines and the rows of the CSV log."""
    monkeypatch.chdir(tmp_path)
    # As in a console script: the folder one works in is not on the path before `main` puts it there.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    (tmp_path / "callback_of_mine.py").write_text(example(), encoding="utf-8")
    (name,) = re.findall(r"class (\w+)\(Callback\)", example())

    def fit(shortest: float) -> tuple[list[dict], list[dict]]:
        mixed = {"alpha": 0.3, "max_new_tokens": 6, "mini_batch_size": 4, "inner_epochs": 1}
        config = tiny_config(
            pair,
            objectives={"long": "PolicyGradient", "single": {"class_path": "ReverseKL", "init_args": {"weight": 0.5}}},
            source={"class_path": "TeacherMixedRollouts", "init_args": mixed},
        )
        config["trainer"]["callbacks"] = [
            {"class_path": f"callback_of_mine.{name}", "init_args": {"path": "terms.jsonl", "shortest": shortest}}
        ]
        main("fit", "--config", write(config, tmp_path / "own.yaml"), "--export.enabled", "false")
        (log,) = (tmp_path / "runs").rglob("metrics.csv")
        with log.open() as file:
            rows = list(csv.DictReader(file))
        return [json.loads(line) for line in (tmp_path / "terms.jsonl").read_text().splitlines()], rows

    yield fit
    monkeypatch.delitem(sys.modules, "callback_of_mine")


def test_the_readmes_callback_sees_every_loss_term_and_every_rollout(run) -> None:
    lines, rows = run(shortest=0.0)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        logged = next(row for row in rows if row["step"] == str(line["step"]) and row["train/loss"])
        assert {"loss", "long", "single"} <= set(line)
        assert line["loss"] == pytest.approx(line["long"] + 0.5 * line["single"], abs=1e-6)
        for name in line.keys() - {"step"}:
            assert line[name] == pytest.approx(float(logged[f"train/{name}"])), name
    lengths = [float(row["rollout/mean_length"]) for row in rows if row.get("rollout/mean_length")]
    own = [float(row["rollout/response_length"]) for row in rows if row.get("rollout/response_length")]
    assert lengths == pytest.approx(own)
    assert len(lengths) == NUM_PHASES


def test_the_readmes_callback_stops_a_run_whose_responses_are_short(run) -> None:
    lines, _ = run(shortest=1e6)
    assert [line["step"] for line in lines] == [1, 2]  # to the end of the first phase


def test_the_readmes_callback_is_short() -> None:
    assert len(example().splitlines()) <= 30


class Listener(L.Callback):
    def __init__(self) -> None:
        self.terms = []

    def on_loss_terms(self, trainer, module, terms) -> None:
        self.terms.append(terms)


def test_a_listener_costs_no_collective_and_sees_tensors_without_graph(pair, tmp_path, monkeypatch) -> None:
    sums = []
    monkeypatch.setattr(DistillationModule, "sum_over_ranks", lambda self, values: sums.append(values) or values)
    counts = []
    for callbacks in ([], [Listener()]):
        learner = DistillationModule(
            ModelSpec(str(pair[0])), {"kl": ForwardKL(), "ce": NextToken(weight=0.5)}, ModelSpec(str(pair[1]))
        )
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=3,
            limit_val_batches=0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(learner, ProceduralData(num_train=32, num_validation=4, num_test=4, batch_size=4))
        counts.append(len(sums))
        sums.clear()
    assert counts[0] == counts[1]
    (listener,) = callbacks
    assert len(listener.terms) == 3
    for terms in listener.terms:
        assert {"kl", "ce", "loss"} <= set(terms)
        assert not any(value.requires_grad for value in terms.values())
        torch.testing.assert_close(terms["loss"], terms["kl"] + 0.5 * terms["ce"])
