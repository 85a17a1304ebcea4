"""GKD and live SeqKD: whose text is learnt from, and that the ends of the scale are other methods, to the bit."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from training import learner_of, quiet_trainer, weights

from lit_distill.callbacks import RolloutMonitor
from lit_distill.data import ProceduralData
from lit_distill.objectives import ForwardKL, NextToken, ReverseKL, TokenPreference
from lit_distill.sources import Source, StudentRollouts, TeacherMixedRollouts, TeacherRollouts


class Shown(L.Callback):
    def __init__(self) -> None:
        self.trajectories = []
        self.steps = []

    def on_rollouts(self, trainer, pl_module, trajectories) -> None:
        self.trajectories.append(trajectories)
        self.steps.append(pl_module.global_step)


def fit(pair: tuple[Path, Path], folder: Path, source: Source | None, objectives, steps: int = 4, **trainer_settings):
    learner, shown = learner_of(pair, objectives, source), Shown()
    trainer = quiet_trainer(folder, steps, callbacks=[RolloutMonitor(), shown], **trainer_settings)
    trainer.fit(learner, ProceduralData(num_train=24, num_validation=4, num_test=4, batch_size=6))
    return learner, shown


def test_with_fraction_zero_it_is_offline_distillation_bit_for_bit(pair, tmp_path) -> None:
    objectives = {"kd": ForwardKL(), "ce": NextToken()}
    offline, _ = fit(pair, tmp_path, None, objectives)
    never, shown = fit(pair, tmp_path, StudentRollouts(on_policy_fraction=0.0), objectives)
    assert torch.equal(weights(offline), weights(never))
    assert not shown.trajectories


def test_with_fraction_one_and_reverse_kl_it_is_the_single_term_of_minillm_without_a_teacher_in_the_mix(
    pair, tmp_path
) -> None:
    gkd, shown = fit(pair, tmp_path, StudentRollouts(max_new_tokens=10, seed=5), {"single": ReverseKL()})
    mixed = TeacherMixedRollouts(alpha=0.0, max_new_tokens=10, mini_batch_size=6, inner_epochs=1, shuffle=False, seed=5)
    minillm, _ = fit(pair, tmp_path, mixed, {"single": ReverseKL()})
    assert len(shown.trajectories) == 4
    torch.testing.assert_close(weights(gkd), weights(minillm), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_student_speaks_in_the_share_of_batches_that_was_asked_for_and_always_in_the_same(pair, tmp_path) -> None:
    runs = [
        fit(pair, tmp_path, StudentRollouts(on_policy_fraction=0.5, max_new_tokens=2), {"kd": ForwardKL()}, steps=40)[
            1
        ].steps
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert 10 <= len(runs[0]) <= 30


def test_the_teachers_words_are_the_targets_of_live_seqkd(pair, tmp_path) -> None:
    learner, shown = fit(
        pair, tmp_path, TeacherRollouts(max_new_tokens=8, temperature=0.0), {"ce": NextToken()}, steps=1
    )
    (said,) = shown.trajectories
    prompt = said.prompts.input_ids[0][said.prompts.attention_mask[0].bool()]
    with torch.no_grad():
        first = learner.teacher.lm.model(input_ids=prompt[None]).logits[0, -1].argmax()
    assert said.responses.ids[0, 0] == first
    text = said.sequences()
    assert text.input_ids[text.target_mask].tolist() == said.responses.ids[said.responses.mask].tolist()


def test_sampling_is_not_differentiated_and_the_responses_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="on_policy_fraction: expected a share"):
        StudentRollouts(on_policy_fraction=1.2)
    with pytest.raises(ValueError, match=r"top_p"):
        TeacherRollouts(top_p=0.0)


def test_token_preference_is_log_2_where_favourites_agree_and_learns_where_they_do_not(pair, tmp_path) -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    same = TokenPreference()(logits, logits + 1)
    torch.testing.assert_close(same.total, torch.tensor(2 * 0.6931472))
    assert float(same.metrics["agreement"]) == 2
    learner, _ = fit(pair, tmp_path, None, {"dpkd": TokenPreference(weight=0.5), "ce": NextToken(weight=0.5)}, steps=2)
    assert float(learner.trainer.callback_metrics["train/dpkd"]) >= 0.6931
    with pytest.raises(ValueError, match="beta"):
        TokenPreference(beta=0.0)


def test_rollouts_draw_from_the_seed_of_the_run_unless_told_otherwise(monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert StudentRollouts().seed == TeacherMixedRollouts().seed == 17
    assert StudentRollouts(seed=3).seed == 3
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert TeacherRollouts().seed == 0
