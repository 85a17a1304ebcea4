"""A step carries only what something reads: prompts, signals and entropies exist where they are asked for."""

from __future__ import annotations

import pytest
from lightning.pytorch import Callback
from training import learner_of, quiet_trainer

from lit_distill.data import ProceduralData
from lit_distill.generation import Decoder
from lit_distill.models import ModelSpec
from lit_distill.objectives import (
    ExtrapolatedReverseKL,
    ForwardKL,
    NextToken,
    PolicyGradient,
    ReverseKL,
    SampledReverseKL,
)
from lit_distill.sources import (
    AdvantageConfig,
    DatasetResponses,
    ReplayRollouts,
    StudentRollouts,
    TeacherMixedRollouts,
    check_signals,
)
from lit_distill.teachers import LocalTeacher
from lit_distill.types import Sequences


class Witness(Callback):
    """Keeps the batch, the rollouts and the first mini-batch of a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batch = batch
        evaluate = pl_module._text

        def watched(text, factors):
            self.text = text
            return evaluate(text, factors)

        watched.objectives = evaluate.objectives
        watched.counts = evaluate.counts
        watched.prefetch = evaluate.prefetch
        pl_module._text = watched

    def on_rollouts(self, trainer, pl_module, trajectories) -> None:
        self.rollouts = trajectories


class Reader(Callback):
    reads_entropies = True


def step(pair, tmp_path, objectives, source=None, *callbacks: Callback) -> Witness:
    witness = Witness()
    learner = learner_of(pair, objectives, source)
    data = ProceduralData(num_train=8, num_validation=2, num_test=2, batch_size=4)
    quiet_trainer(tmp_path, max_steps=1, callbacks=[witness, *callbacks]).fit(learner, data)
    return witness


def mixed() -> TeacherMixedRollouts:
    return TeacherMixedRollouts(max_new_tokens=4, mini_batch_size=4, inner_epochs=1)


def test_prompts_are_padded_only_for_a_source_that_generates(pair, tmp_path) -> None:
    assert step(pair, tmp_path, {"kd": ForwardKL()}).batch.prompts is None
    generates = step(pair, tmp_path, {"kd": ForwardKL()}, StudentRollouts(max_new_tokens=4))
    assert len(generates.batch.prompts) == 4


def test_a_mini_batch_has_the_signals_that_its_objectives_need_and_no_others(pair, tmp_path) -> None:
    text = step(pair, tmp_path, {"long": PolicyGradient(), "ce": NextToken()}, mixed()).text
    assert isinstance(text, Sequences)
    assert set(text.signals) == PolicyGradient().needs - {"student_logits", "labels"}
    rollouts = step(pair, tmp_path, {"ce": NextToken()}, mixed())
    assert not rollouts.text.signals
    assert "rewards" in rollouts.rollouts.signals  # callbacks see all of them


@pytest.mark.parametrize("reads", [False, True])
def test_entropies_are_computed_only_for_a_callback_that_reads_them(pair, tmp_path, monkeypatch, reads: bool) -> None:
    calls = []
    monkeypatch.setattr(
        "lit_distill.generation.cached_decoder.entropy", lambda logits: calls.append(1) or logits.sum(-1)
    )
    callbacks = [Reader()] if reads else []
    responses = step(pair, tmp_path, {"long": PolicyGradient()}, mixed(), *callbacks).rollouts.responses
    assert (responses.student_entropy is not None) == (responses.teacher_entropy is not None) == reads
    assert bool(calls) == reads


def test_the_own_generator_keeps_its_interface(student, teacher) -> None:
    alone, both = Decoder(student, (0,)), Decoder(student, (0,), teacher)
    assert alone.exact
    assert not alone.mixes_teacher
    assert both.mixes_teacher


@pytest.mark.parametrize(
    "source",
    [
        DatasetResponses(),
        StudentRollouts(on_policy_fraction=0.5),
        StudentRollouts(temperature=0.7),
        StudentRollouts(top_p=0.9),
        StudentRollouts(top_k=5),
        StudentRollouts(temperature=0.0),
        StudentRollouts(mini_batch_size=2),
        TeacherMixedRollouts(),
        ReplayRollouts(),
    ],
    ids=lambda source: type(source).__name__,
)
def test_a_sampled_divergence_needs_the_students_own_untruncated_text(source) -> None:
    with pytest.raises(ValueError, match=r"^objectives\.pg: SampledReverseKL at temperature 1\.0 is unbiased only for"):
        check_signals(source, {"pg": SampledReverseKL()}, {}, LocalTeacher(ModelSpec("teacher")))


def test_it_accepts_that_text_at_its_own_temperature() -> None:
    teacher = LocalTeacher(ModelSpec("teacher"))
    check_signals(StudentRollouts(), {"pg": SampledReverseKL()}, {}, teacher)
    check_signals(StudentRollouts(temperature=0.7), {"pg": SampledReverseKL(temperature=0.7)}, {}, teacher)


@pytest.mark.parametrize(
    ("extrapolation", "single"),
    [(1.25, ReverseKL()), (1.25, ExtrapolatedReverseKL(scale=1.5)), (1.0, ExtrapolatedReverseKL(scale=1.25))],
)
def test_the_single_term_of_another_reward_is_refused(extrapolation, single) -> None:
    source = TeacherMixedRollouts(scoring=AdvantageConfig(extrapolation=extrapolation))
    teacher = LocalTeacher(ModelSpec("teacher"))
    with pytest.raises(
        ValueError, match=rf"^objectives\.single: with scoring\.extrapolation: {extrapolation}, the Single"
    ):
        check_signals(source, {"single": single}, {}, teacher, teacher)


@pytest.mark.parametrize("extrapolation", [0.0, -1.0, float("inf"), float("nan")])
def test_an_extrapolation_that_is_no_positive_number_is_refused(extrapolation) -> None:
    with pytest.raises(ValueError, match="extrapolation: expected a finite number > 0"):
        AdvantageConfig(extrapolation=extrapolation)


def test_an_extrapolated_reward_is_one_at_temperature_one() -> None:
    with pytest.raises(ValueError, match=r"^temperature: 0\.7, but scoring\.extrapolation: 2\.0 compares"):
        TeacherMixedRollouts(temperature=0.7, scoring=AdvantageConfig(extrapolation=2.0))
