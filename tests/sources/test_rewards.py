"""Rewards of the user's own: what they are asked, what they add to the gradient, where they are recorded and logged."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from training import learner_of, quiet_trainer, weights

from lit_distill.callbacks import RolloutMonitor, RolloutRecorder
from lit_distill.data import ProceduralData
from lit_distill.evaluation import CheckerReward, NumberMatch
from lit_distill.objectives import PolicyGradient, ReverseKL
from lit_distill.sources import AdvantageConfig, Answer, Reward, TeacherMixedRollouts
from lit_distill.types import ArgumentError, Responses

SIZES = {"num_validation": 2, "num_test": 2, "batch_size": 6}


class Length(Reward):
    """The number of characters, and what it was asked."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.asked: list[Answer] = []

    def __call__(self, answers):
        self.asked += answers
        return [len(answer.response) for answer in answers]


class Wrong(Reward):
    def __init__(self, scores) -> None:
        super().__init__()
        self.scores = scores

    def __call__(self, answers):
        return self.scores


class Seen(L.Callback):
    def __init__(self) -> None:
        self.rollouts = []

    def on_rollouts(self, trainer, pl_module, trajectories) -> None:
        self.rollouts.append(trajectories)


def run(pair, folder, rewards, callbacks=(), steps: int = 1, **source):
    objectives = {"long": PolicyGradient(), "single": ReverseKL(importance_weighted=True)}
    settings = {"max_new_tokens": 6, "mini_batch_size": 6, "inner_epochs": 1, **source}
    module = learner_of(pair, objectives, TeacherMixedRollouts(rewards=rewards, **settings))
    quiet_trainer(folder, steps, callbacks=list(callbacks)).fit(module, ProceduralData(12, **SIZES))
    return module


def test_a_reward_is_asked_with_texts_references_and_fields(pair, tmp_path) -> None:
    length = Length()
    length.fields = frozenset({"instruction"})
    seen = Seen()
    module = run(pair, tmp_path, {"length": length}, [seen])
    (rollouts,) = seen.rollouts
    assert [answer.id for answer in length.asked] == list(rollouts.ids)
    assert [answer.prompt for answer in length.asked] == list(rollouts.prompt_texts)
    assert all(answer.references and answer.fields["instruction"] in answer.prompt for answer in length.asked)
    assert [answer.finished for answer in length.asked] == rollouts.responses.finished(module.stop_ids).tolist()
    assert rollouts.scores["length"].tolist() == [len(answer.response) for answer in length.asked]


def test_a_score_is_added_to_the_advantage_of_every_token_of_its_response() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    logprobs = torch.zeros(3, 3)
    responses = Responses(torch.ones(3, 3, dtype=torch.int64), mask, logprobs, logprobs)
    rest = [[-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    for gamma, expected in ((1.0, [[2.0, 2.0, 2.0], *rest]), (0.5, [[0.5, 1.0, 2.0], *rest])):
        signals = AdvantageConfig(gamma=gamma).signals(responses, 0.0, scores=torch.tensor([2.0, -1.0, 9.0]))
        assert signals["advantages"].tolist() == expected


def test_a_weight_scales_the_score_and_zero_changes_nothing(pair, tmp_path) -> None:
    without, zero, one = (weights(run(pair, tmp_path, r)) for r in ({}, {"a": Length(0.0)}, {"a": Length(1.0)}))
    assert torch.equal(without, zero)
    twice = weights(run(pair, tmp_path, {"a": Length(0.25), "b": Length(0.75)}))
    torch.testing.assert_close(twice, one, rtol=0, atol=1e-6)
    assert not torch.allclose(without, one, atol=1e-4)


def test_scores_are_logged_and_recorded(pair, tmp_path) -> None:
    seen, recorder = Seen(), RolloutRecorder(path=str(tmp_path / "r"))
    module = run(pair, tmp_path, {"length": Length()}, [seen, recorder, RolloutMonitor()])
    scores = seen.rollouts[0].scores["length"]
    assert float(module.trainer.callback_metrics["rollout/score_length"]) == pytest.approx(float(scores.mean()))
    lines = [json.loads(line) for line in (tmp_path / "r" / "rollouts-rank0.jsonl").read_text().splitlines()]
    assert [line["score_length"] for line in lines] == scores.tolist()


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0], "must return one number for each of the 6 responses, but returned 1"),
        ([float("nan")] * 6, "returned nan for the response to the item 'train-"),
        (None, "must return a list of one number for each response, but returned None"),
        (0.5, "must return a list of one number for each response, but returned 0.5"),
        (["a"] * 6, "must return a list of one number for each response"),
    ],
)
def test_a_reward_that_returns_something_else_is_named(pair, tmp_path, scores, words) -> None:
    with pytest.raises(ArgumentError, match=rf"mine {words}"):
        run(pair, tmp_path, {"mine": Wrong(scores)})


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^weight: expected a finite number for Length, got nan"):
        Length(float("nan"))


def test_a_reward_without_the_base_constructor_is_named(pair, tmp_path) -> None:
    class Plain(Reward):
        def __init__(self) -> None:
            pass

        def __call__(self, answers):
            return [0.0] * len(answers)

    with pytest.raises(
        ValueError, match=r"^rewards\.mine: call super\(\)\.__init__\(weight\) in the constructor of Plain"
    ):
        TeacherMixedRollouts(rewards={"mine": Plain()})


def test_rewards_that_no_objective_uses_are_refused(pair) -> None:
    source = TeacherMixedRollouts(rewards={"mine": Length()})
    with pytest.raises(ValueError, match=r"^rewards: no objective uses mine. Add `long: PolicyGradient`"):
        learner_of(pair, {"single": ReverseKL()}, source)


def test_a_checker_is_a_reward_and_names_the_item_that_it_cannot_read(pair, tmp_path) -> None:
    answers = [Answer("a", "", "so 5", ("5",), {}, True), Answer("b", "", "so 6", ("5",), {}, True)]
    reward = CheckerReward(NumberMatch())
    assert reward(answers) == [1.0, 0.0]
    with pytest.raises(ArgumentError, match=r"the reference 'no idea' has no number .* This is the item 'c'"):
        reward([Answer("c", "", "5", ("no idea",), {}, True)])
    with pytest.raises(ArgumentError, match=r"checker: the item 'd' has no reference"):
        reward([Answer("d", "", "5", (), {}, True)])
    for references, words in (["no idea"], r"no number .* the item 'e'"), ([], r"the item 'e' has no reference"):
        with pytest.raises(ArgumentError, match=words):
            reward.check("e", references)
