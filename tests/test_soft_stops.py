"""A run that was stopped, whatever stopped it and wherever, goes on to the items and the bits of one that was not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from soft_stops import BATCHES, STOPS, Run, data, learner, same

from lit_distill.objectives import DirectPreference, ForwardKL, JensenShannon, NextToken, PolicyGradient, ReverseKL
from lit_distill.optim import WarmupCosine
from lit_distill.sources import ReplayRollouts, ResponsePairs, StudentRollouts, TeacherMixedRollouts, TeacherRollouts

SHORT = {"epochs": {"max_epochs": 2}, "steps": {"max_steps": 2 * BATCHES}}
LONG = {"epochs": {"max_epochs": 3}, "steps": {"max_steps": 3 * BATCHES}}
ON = {"limit_val_batches": 1.0}
VALIDATION: dict[str, dict[str, Any]] = {
    "none": {},
    "each epoch": ON,
    "every 2 batches": {**ON, "val_check_interval": 2},
    "every 3 batches over epochs": {**ON, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "each second epoch": {**ON, "check_val_every_n_epoch": 2},
}
PHASE = {"max_new_tokens": 4, "mini_batch_size": 2, "inner_epochs": 2}  # four steps of a batch
REPLAY = {"increment": 0.3, "tolerance": 0.0, "capacity": 6, "max_new_tokens": 4}
SOURCES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], int]] = {
    "student": (lambda: StudentRollouts(0.5, max_new_tokens=4), lambda: {"jsd": JensenShannon()}, 1),
    "teacher": (lambda: TeacherRollouts(max_new_tokens=4), lambda: {"ce": NextToken()}, 1),
    "replay": (lambda: ReplayRollouts(0.6, **REPLAY), lambda: {"kd": ForwardKL()}, 1),
    "mixed": (
        lambda: TeacherMixedRollouts(**PHASE),
        lambda: {"long": PolicyGradient(), "single": ReverseKL()},
        4,
    ),
    "pairs": (
        lambda: ResponsePairs("teacher", **PHASE),
        lambda: {"dpkd": DirectPreference(), "ce": NextToken()},
        4,
    ),
}


@pytest.fixture(scope="module")
def straight(pair, tmp_path_factory) -> Callable[..., Run]:
    """The run that nothing stops, once for each way to run it."""
    done: dict[str, Run] = {}

    def run(bound: str, validation: str) -> Run:
        if (key := f"{bound}, {validation}") not in done:
            folder = tmp_path_factory.mktemp("straight")
            done[key] = Run(learner(pair), folder, **LONG[bound], **VALIDATION[validation])
        return done[key]

    return run


@pytest.fixture(scope="module")
def whole_of(pair, tmp_path_factory) -> Callable[[str], tuple[dict[str, Any], Run]]:
    """The settings of the Trainer and the run that nothing stops, once for each source."""

    @cache
    def run(name: str) -> tuple[dict[str, Any], Run]:
        source, objectives, steps = SOURCES[name]
        settings = {**VALIDATION["every 3 batches over epochs"], "max_steps": 2 * BATCHES * steps}
        return settings, Run(learner(pair, source, objectives()), tmp_path_factory.mktemp("whole"), **settings)

    return run


def check_continued(first: Run, second: Run, whole: Run) -> None:
    assert first.journal.read + second.journal.read == whole.journal.read
    ours, expected = second.end(), whole.end()
    for name, value in expected.items():
        assert same(ours[name], value), name
    # a stop may bring one validation more, or end an epoch in the middle of the phase that is its last
    validated = [step for step in first.journal.validated if step in whole.journal.validated]
    assert validated + second.journal.validated == whole.journal.validated
    # a checkpoint of a validation at the end of an epoch is from before that end, which comes again
    ended = {end for end in first.journal.ended if end in whole.journal.ended}
    assert sorted(ended | {*second.journal.ended}) == whole.journal.ended


def stopped(pair, folder, stop: str, at: int, bound: str, validation: str) -> Run:
    limits = {**SHORT[bound], "max_steps": at} if stop == "max_steps" else SHORT[bound]
    callbacks = [] if stop == "max_steps" else [STOPS[stop](at)]
    return Run(learner(pair), folder, callbacks, **limits, **VALIDATION[validation])


@pytest.mark.parametrize(
    ("stop", "at", "bound", "validation"),
    [
        ("should_stop", 3, "epochs", "none"),
        ("max_steps", 3, "steps", "each epoch"),
        ("should_stop", 4, "steps", "none"),
        ("should_stop", 4, "epochs", "every 3 batches over epochs"),
        ("should_stop at the start of an epoch", 4, "epochs", "none"),
    ],
)
def test_after_a_stop_the_same_items_come_and_the_same_bits(
    pair, straight, tmp_path, stop: str, at: int, bound: str, validation: str
) -> None:
    first = stopped(pair, tmp_path, stop, at, bound, validation)
    assert len(first.journal.read) == at
    second = Run(learner(pair), tmp_path, ckpt_path=first.last, **LONG[bound], **VALIDATION[validation])
    check_continued(first, second, straight(bound, validation))


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["max_steps", *STOPS])
def test_so_it_is_for_every_stop_at_every_second_batch_of_two_epochs(pair, straight, tmp_path, stop: str) -> None:
    """Validations and bounds of the run take turns, so that each stop meets each of them."""
    count, seldom = 0, any(word in stop for word in ("validation", "epoch"))  # such hooks are called at few batches
    every = BATCHES if "epoch" in stop else 1 if seldom else 2
    for at in range(BATCHES if "epoch" in stop else 1, 2 * BATCHES + 1, every):
        for turn in range(3 if seldom else 1):
            validation = list(VALIDATION)[(at + 2 * turn + len(stop)) % len(VALIDATION)]
            if "validation" in stop and validation == "none":
                continue
            bound = list(SHORT)[(at // BATCHES + turn) % 2]
            folder = tmp_path / f"{at} {validation}"
            first = stopped(pair, folder, stop, at, bound, validation)
            if len(first.journal.read) == at:
                second = Run(learner(pair), folder, ckpt_path=first.last, **LONG[bound], **VALIDATION[validation])
                check_continued(first, second, straight(bound, validation))
                count += 1
    assert count >= (2 if seldom else BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stop", "at"),
    [
        ("replay", "should_stop", 2),
        ("mixed", "max_steps", 6),
        *(
            (name, stop, at)
            for name, (_, _, steps) in SOURCES.items()
            for stop, at in (("should_stop", 3), ("max_steps", 5), ("SIGTERM", 6 if steps == 1 else 2))
        ),
        *(("pairs", "max_steps", at) for at in (13, 16, 30)),
    ],
)
def test_so_it_is_for_every_source_also_inside_a_phase(pair, whole_of, tmp_path, name: str, stop: str, at: int) -> None:
    source, objectives, steps = SOURCES[name]
    settings, whole = whole_of(name)
    callbacks = [] if stop == "max_steps" else [STOPS[stop](at)]
    limits = {"max_steps": at} if stop == "max_steps" else {}
    first = Run(learner(pair, source, objectives()), tmp_path / "stopped", callbacks, **{**settings, **limits})
    assert first.trainer.global_step == (at if stop == "max_steps" else at * steps)
    if stop == "max_steps" and at % steps:  # a batch that is not finished comes again, and is not rolled out again
        first.journal.read.pop()
    second = Run(learner(pair, source, objectives()), tmp_path / "stopped", ckpt_path=first.last, **settings)
    check_continued(first, second, whole)


def test_the_steps_that_max_steps_cut_off_a_phase_are_left_out_by_a_run_of_other_batches(pair, tmp_path) -> None:
    source, objectives, _ = SOURCES["mixed"]
    Run(learner(pair, source, objectives()), tmp_path, max_steps=6)
    module = learner(pair, source, objectives())
    items = data(corpus_rows=8, batch_size=8)
    with pytest.warns(UserWarning, match="max_steps ended the run after 2 of the 4 optimiser steps of a batch"):
        run = Run(module, tmp_path, ckpt_path=tmp_path / "last.ckpt", items=items, max_steps=14)
    assert [batch_idx for _, batch_idx, *_ in run.journal.read] == [1]


def test_so_it_is_by_epochs_with_a_schedule_over_the_run_whose_length_is_asked_for_early(pair, tmp_path) -> None:
    def module():
        return learner(pair, lr_scheduler=lambda optimizer: WarmupCosine(optimizer, warmup_steps=2))

    whole = Run(module(), tmp_path / "whole", max_epochs=2)
    first = Run(module(), tmp_path, [STOPS["should_stop"](3)], max_epochs=2)
    check_continued(first, Run(module(), tmp_path, ckpt_path=first.last, max_epochs=2), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "at"), [("should_stop", 3), ("max_steps", 4), ("max_time", 6)])
def test_so_it_is_with_workers(pair, straight, tmp_path, stop: str, at: int) -> None:
    whole = straight("epochs", "every 2 batches")
    settings = VALIDATION["every 2 batches"]
    limits = {**SHORT["epochs"], "max_steps": at} if stop == "max_steps" else SHORT["epochs"]
    callbacks = [] if stop == "max_steps" else [STOPS[stop](at)]
    first = Run(learner(pair), tmp_path, callbacks, items=data(num_workers=2), **limits, **settings)
    second = Run(learner(pair), tmp_path, ckpt_path=first.last, items=data(num_workers=2), **LONG["epochs"], **settings)
    check_continued(first, second, whole)


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{"limit_train_batches": 3}, {"limit_train_batches": 0.5}, {"overfit_batches": 3}])
@pytest.mark.parametrize("bound", SHORT)
def test_so_it_is_in_epochs_that_are_cut_short(pair, tmp_path, limits: dict[str, Any], bound: str) -> None:
    whole = Run(learner(pair), tmp_path / "whole", **LONG[bound], **limits)
    for at in (1, 2, 3, 4):
        folder = tmp_path / str(at)
        first = Run(learner(pair), folder, [STOPS["should_stop"](at)], **SHORT[bound], **limits)
        second = Run(learner(pair), folder, ckpt_path=first.last, **LONG[bound], **limits)
        check_continued(first, second, whole)


@pytest.mark.slow
@pytest.mark.parametrize("every", [2])
def test_so_it_is_when_a_run_is_killed_after_a_checkpoint_at_any_batch(pair, tmp_path, every: int) -> None:
    """By epochs: also after the last batch of one, after which no validation comes."""
    whole = Run(learner(pair), tmp_path / "whole", **LONG["epochs"])
    settings = {"save_top_k": -1, "every_n_train_steps": every}
    first = Run(learner(pair), tmp_path, checkpoint=settings, **LONG["epochs"])
    for step in range(every, 3 * BATCHES, every):
        path = tmp_path / f"step={step}.ckpt"
        second = Run(learner(pair), tmp_path / str(step), ckpt_path=path, checkpoint=settings, **LONG["epochs"])
        third = tmp_path / str(step) / f"step={min(step + 2, 3 * BATCHES - 1) // every * every}.ckpt"
        again = (
            Run(learner(pair), tmp_path / f"{step} again", ckpt_path=third, **LONG["epochs"])
            if third.exists()
            else None
        )
        assert first.journal.read[:step] + second.journal.read == whole.journal.read
        for run in (second, again):
            for name, value in whole.end().items() if run else ():
                assert same(run.end()[name], value), (step, name)


class Stumble(Callback):
    """An error in the third step, before it changes anything."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("stumbled")


def test_a_batch_that_ended_in_an_error_comes_again_from_a_checkpoint_of_that_moment(pair, straight, tmp_path) -> None:
    settings = {"save_on_exception": True, "save_top_k": -1}
    with pytest.raises(RuntimeError, match="stumbled"):
        Run(learner(pair), tmp_path, [Stumble()], checkpoint=settings, **LONG["steps"])
    second = Run(learner(pair), tmp_path, ckpt_path=tmp_path / "last.ckpt", **LONG["steps"])
    whole = straight("steps", "none")
    assert second.journal.read == whole.journal.read[2:]
    assert same(second.end()["weights"], whole.end()["weights"])
    assert second.end()["batches"] == whole.end()["batches"]


def test_a_checkpoint_that_took_the_epoch_for_a_whole_one_and_counts_batches_is_understood(
    pair, straight, tmp_path
) -> None:
    """What was written at such a stop before."""
    first = Run(learner(pair), tmp_path, [STOPS["should_stop"](3)], **SHORT["epochs"])
    saved = torch.load(first.last, weights_only=True)
    loop = saved["loops"]["fit_loop"]
    assert loop["epoch_progress"]["total"]["processed"] == 0  # which is true
    for counts in loop["epoch_progress"].values():
        counts.update(processed=1, completed=1)
    loop["state_dict"]["combined_loader"] = [{"epoch": 0, "batches": 3}]
    torch.save(saved, first.last)
    second = Run(learner(pair), tmp_path, ckpt_path=first.last, **LONG["epochs"])
    check_continued(first, second, straight("epochs", "none"))
