"""Progress is told in optimiser steps, also while a phase decodes and learns; without a terminal it is quiet."""

from __future__ import annotations

import io
import re
from functools import partial
from itertools import groupby
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks.progress import tqdm_progress

from lit_distill.callbacks import GenerationEvaluator, RunProgress, progress
from lit_distill.data import ProceduralData
from lit_distill.generation import SamplingParams, generate
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL, PolicyGradient, ReverseKL
from lit_distill.sources import TeacherMixedRollouts
from lit_distill.types import Prompts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    screen = Terminal()
    for module in (progress, tqdm_progress):
        monkeypatch.setattr(module, "sys", SimpleNamespace(stdout=screen))
    monkeypatch.setattr(progress, "Tqdm", partial(progress.Tqdm, mininterval=0))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_DESCRIPTIONS", 0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_METRICS", 0)
    return screen


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(progress, "rank_zero_info", said.append)
    return said


def fit(pair, *callbacks: Callback, generates: bool = True, ckpt_path=None, **settings) -> L.Trainer:
    """Phases of six optimiser steps, two of them in an epoch; or batches of one."""
    student, teacher = pair
    mixed = TeacherMixedRollouts(max_new_tokens=4, mini_batch_size=4, inner_epochs=3)
    objectives = {"long": PolicyGradient(), "single": ReverseKL()} if generates else {"kd": ForwardKL()}
    learner = DistillationModule(
        ModelSpec(str(student)),
        objectives,
        ModelSpec(str(teacher)),
        mixed if generates else None,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    given = {"max_epochs": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, **settings}
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **given,
    )
    trainer.fit(learner, ProceduralData(num_train=16, num_validation=4, num_test=4, batch_size=8), ckpt_path=ckpt_path)
    return trainer


def shown(screen: Terminal) -> list[str]:
    return [part for part in re.split(r"[\r\n]", screen.getvalue()) if part.strip()]


@pytest.mark.parametrize(
    ("settings", "total"), [({}, 12), ({"max_steps": 9, "max_epochs": 5}, 9), ({"max_epochs": 2}, 24)]
)
def test_the_bar_counts_optimiser_steps_to_the_end_of_the_run(pair, terminal, settings, total) -> None:
    trainer = fit(pair, RunProgress(), **settings)
    assert trainer.global_step == total
    steps = [int(n) for part in shown(terminal) for n in re.findall(rf"^epoch.* (\d+)/{total} ", part)]
    assert steps == sorted(steps)
    assert set(steps) & {1, 2, 3, 4, 5}  # it moves inside a phase
    assert steps[-1] == total
    assert re.search(r"steps/s, .*loss=.*tok/s=", shown(terminal)[-1])


def test_the_bar_says_what_the_run_is_doing(pair, terminal) -> None:
    fit(pair, RunProgress())
    said = [re.match(r"epoch 0[^|]*?(?=: +\d+%)", part) for part in shown(terminal)]
    said = [re.sub(r" of 8 responses, \d+ tok/s", "", found[0]) for found in said if found]
    phase = [f"epoch 0 · decoding {n}/4 tokens" for n in range(4)] + ["epoch 0"]
    phase += [f"epoch 0: inner epoch {n}/3" for n in (1, 2, 3)]
    assert [text for text, _ in groupby(said)] == ["epoch 0", *phase, *phase]


def test_evaluation_says_its_batch_and_what_it_decodes(pair, terminal) -> None:
    fit(pair, RunProgress(), GenerationEvaluator(max_new_tokens=5), generates=False, limit_val_batches=1)
    said = [part for part in shown(terminal) if part.startswith("validation: batch 1/1")]
    assert any(re.search(r"decoding 4/5 tokens of 4 responses, \d+ tok/s", part) for part in said)


def test_without_a_terminal_it_is_quiet_between_two_lines(pair, lines, capsys) -> None:
    fit(pair, RunProgress())
    assert lines == []
    assert "|" not in capsys.readouterr().out


def test_lines_say_step_speed_time_left_and_what_is_going_on(pair, lines) -> None:
    fit(pair, RunProgress(seconds_between_lines=0.0))
    assert lines[0] == "step 0/12 · epoch 0"
    assert re.fullmatch(r"step 0/12 · epoch 0 · decoding 0/4 tokens of 8 responses, \d+ tok/s", lines[1])
    after = [line for line in lines if line.startswith("step 3/12")]
    assert re.match(r"step 3/12 · .*loss .* · [\d.]+ steps/s · \d+ tok/s · epoch 0.* · \d\d:\d\d left$", after[0])
    assert any(line.startswith("step 12/12") for line in lines)


def test_a_token_counts_once_however_often_it_is_learnt_from(pair, lines) -> None:
    class Count(Callback):
        rolled_out = 0

        def on_rollouts(self, trainer, pl_module, trajectories) -> None:
            self.rolled_out += int(trajectories.responses.mask.sum())

    bars, count = RunProgress(), Count()
    fit(pair, bars, count)
    assert int(bars._tokens) == count.rolled_out > 0
    bars = RunProgress()
    trainer = fit(pair, bars, generates=False)
    batches = [batch.sequences.target_mask for batch in trainer.datamodule.train_dataloader()]
    assert int(bars._tokens) == sum(int(mask.sum()) for mask in batches)


def test_a_resumed_run_goes_on_where_it_stopped(pair, terminal, tmp_path) -> None:
    trainer = fit(pair, RunProgress(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    terminal.truncate(0)
    fit(pair, RunProgress(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    steps = [int(n) for part in shown(terminal) for n in re.findall(r"(\d+)/24 ", part)]
    assert min(steps) == 12
    assert max(steps) == 24


class Stop(Callback):
    def on_rollouts(self, trainer, pl_module, trajectories) -> None:
        self.module, self.followed = pl_module, pl_module.decoding_progress is not None
        raise RuntimeError("stop")


def test_nobody_follows_the_decode_loop_after_the_run_also_after_one_that_failed(pair, lines) -> None:
    assert fit(pair, RunProgress()).lightning_module.decoding_progress is None
    stop = Stop()
    with pytest.raises(RuntimeError, match="stop"):
        fit(pair, RunProgress(), stop)
    assert stop.followed
    assert stop.module.decoding_progress is None


def test_a_progress_hook_sees_every_step_and_the_end(student) -> None:
    seen = []

    def follow(*news: int) -> None:
        seen.append(news)

    prompts = Prompts(torch.tensor([[3, 4], [5, 6]]), torch.ones(2, 2, dtype=torch.int64))
    generate(student, prompts, SamplingParams(5, temperature=0.0), [], on_step=follow)
    assert seen == [*((step, 5, 2) for step in range(5)), (5, 5, 0)]
    seen.clear()
    everything = range(41)  # every token ends a text
    generate(student, prompts, SamplingParams(50, temperature=0.0), list(everything), on_step=follow)
    assert seen[-1] == (50, 50, 0)
    assert len(seen) < 15
