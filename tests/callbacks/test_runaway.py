"""The warnings of a student that runs away: when, with which figures, and once of each kind."""

from __future__ import annotations

import json

import pytest

from lit_distill.callbacks.runaway import RunawayDetector

Validation = tuple[float, float, float | None]


def warnings_of(*validations: Validation, detector: RunawayDetector | None = None) -> list[tuple[int, str]]:
    """Step and text of the warnings of validations at the steps 1, 2, …"""
    detector = detector or RunawayDetector()
    return [(step, text) for step, seen in enumerate(validations, start=1) for text in detector.check(step, *seen)]


@pytest.mark.parametrize(
    ("now", "warns"),
    [
        ((20.1, 0.31, None), True),
        ((20.0, 0.31, None), False),  # not more than twice as long
        ((20.1, 0.29, None), False),  # hardly more are cut off
        ((40.1, 0.1, None), True),  # so long that it does not matter
        ((40.0, 0.1, None), False),
        ((15.0, 0.95, None), True),  # near the limit a length cannot double
        ((15.0, 0.94, None), False),
        ((5.0, 0.96, None), False),  # shorter
        ((5.0, 0.9, None), False),  # shorter: a collapse, which the rollouts warn of
    ],
)
def test_responses_run_away_if_they_grow_and_are_cut_off_or_grow_a_lot(now: Validation, warns: bool) -> None:
    assert bool(warnings_of((10.0, 0.1, None), now)) == warns


@pytest.mark.parametrize(
    ("course", "warns"),
    [
        ((0.6, 0.9, 0.61), False),
        ((0.6, 0.9, 0.59), True),  # of the highest, not of the first
        ((0.9, 0.6), True),  # by exactly a third
        ((0.3, 0.6, 0.9), False),
        ((0.0, 0.0), False),
    ],
)
def test_the_overlap_has_fallen_if_a_third_of_its_highest_value_is_gone(course: tuple[float, ...], warns: bool) -> None:
    assert bool(warnings_of(*[(10.0, 0.0, overlap) for overlap in course])) == warns


def test_the_warning_of_length_has_the_figures_the_step_and_what_to_do() -> None:
    ((step, text),) = warnings_of((10.0, 0.05, None), (12.0, 0.1, None), (33.3, 0.5, None))
    assert step == 3
    assert "at step 3" in text
    assert "length 10.0 -> 33.3 tokens, unfinished 5% -> 50%" in text
    for advice in ("model.optimizer.lr", "ReferenceKL", "renormalised", "model.targets.skip_special_tokens"):
        assert advice in text


def test_the_warning_of_overlap_has_the_figures_the_step_and_what_to_do() -> None:
    ((step, text),) = warnings_of((10.0, 0.0, 0.5), (10.0, 0.0, 0.8), (10.0, 0.0, 0.4))
    assert step == 3
    assert "at step 3" in text
    assert "80% -> 40%" in text
    assert "model.optimizer.lr" in text


def test_each_kind_is_warned_of_once() -> None:
    bad = (50.0, 0.9, 0.1)
    found = warnings_of((10.0, 0.0, 0.9), (50.0, 0.9, 0.9), bad, bad, bad)
    assert [step for step, _ in found] == [2, 3]
    assert "length" in found[0][1]
    assert "overlap" in found[1][1]


def test_an_interrupted_run_warns_where_a_whole_one_does() -> None:
    course: list[Validation] = [(10.0, 0.0, 0.9), (12.0, 0.0, 0.8), (50.0, 0.9, 0.8), (50.0, 0.9, 0.5)]
    whole = [text for _, text in warnings_of(*course)]
    assert len(whole) == 2
    for stop in range(len(course)):
        before, after = RunawayDetector(), RunawayDetector()
        first = [text for step in range(stop) for text in before.check(step + 1, *course[step])]
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        rest = [text for step in range(stop, len(course)) for text in after.check(step + 1, *course[step])]
        assert first + rest == whole
