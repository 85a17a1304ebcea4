"""GKD and live SeqKD: whose text is learnt from, and that the ends of the scale are other methods, to the bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from training import learner_of, quiet_trainer, weights

from lit_distill.callbacks import RolloutMonitor
from lit_distill.data import ProceduralData
from lit_distill.objectives import ForwardKL, NextToken, ReverseKL, TokenPreference
from lit_distill.sources import ReplayRollouts, Source, StudentRollouts, TeacherMixedRollouts, TeacherRollouts


class Shown(L.Callback):
    def __init__(self) -> None:
        self.trajectories = []
        self.steps = []

    def on_rollouts(self, trainer, pl_module, trajectories) -> None:
        self.trajectories.append(trajectories)
        self.steps.append(pl_module.global_step)


def fit(
    pair: tuple[Path, Path],
    folder: Path,
    source: Source | None,
    objectives,
    steps: int = 4,
    data=None,
    **trainer_settings,
):
    learner, shown = learner_of(pair, objectives, source), Shown()
    trainer = quiet_trainer(folder, steps, callbacks=[RolloutMonitor(), shown], **trainer_settings)
    trainer.fit(
        learner, ProceduralData(num_train=24, num_validation=4, num_test=4, **{"batch_size": 6, **(data or {})})
    )
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


@pytest.mark.parametrize("source", [TeacherRollouts, StudentRollouts])
def test_the_responses_to_a_batch_are_generated_once_and_learnt_in_several_steps(pair, tmp_path, source) -> None:
    learner, shown = fit(pair, tmp_path, source(max_new_tokens=8, mini_batch_size=2), {"kd": ForwardKL()}, steps=7)
    assert learner.global_step == 7
    assert shown.steps == [0, 3, 6]
    assert [len(trajectories.ids) for trajectories in shown.trajectories] == [6, 6, 6]


def test_the_teachers_responses_are_the_same_a_batch_at_a_time_or_several(pair, tmp_path) -> None:
    said = []
    for size, mini_batch_size in ((2, None), (6, 2)):
        source = TeacherRollouts(max_new_tokens=8, temperature=0.0, mini_batch_size=mini_batch_size)
        _, shown = fit(pair, tmp_path, source, {"kd": ForwardKL()}, steps=3, data={"batch_size": size})
        rows = [
            (t.ids[i], t.responses.ids[i][t.responses.mask[i]].tolist())
            for t in shown.trajectories
            for i in range(size)
        ]
        assert len(rows) == 6
        said.append(dict(rows))
    assert said[0] == said[1]


def test_the_mini_batches_of_a_batch_hold_each_response_once_and_not_by_length(pair, tmp_path) -> None:
    learnt, own = [], TeacherRollouts(max_new_tokens=8, mini_batch_size=2)
    generate, original = own.mini_batches, []

    def watched(batch, context):
        original.append(batch.ids)
        for text in generate(batch, context):
            learnt.append([item.id for item in text.items])
            yield text

    own.mini_batches = watched
    fit(pair, tmp_path, own, {"kd": ForwardKL()}, steps=12, data={"batch_size": 12})
    orders = [[name for ids in learnt[6 * n : 6 * n + 6] for name in ids] for n in range(2)]
    assert [sorted(order) for order in orders] == [sorted(ids) for ids in original]
    assert all(order != list(ids) for order, ids in zip(orders, original, strict=True))


def test_ranks_with_different_numbers_of_mini_batches_are_refused() -> None:
    data = ProceduralData(num_train=32, batch_size=6)
    data.num_items = lambda _: 32
    trainer = SimpleNamespace(datamodule=data, distributed_sampler_kwargs={"num_replicas": 4, "rank": 0})
    with pytest.raises(
        ValueError, match=r"mini_batch_size: 4 with data\.init_args\.batch_size 6 on 4 ranks.*multiple of 4"
    ):
        TeacherRollouts(mini_batch_size=4).check_trainer(trainer)
    with pytest.raises(ValueError, match=r"mini_batch_size: 6 on 4 ranks cannot be shared equally"):
        TeacherRollouts(mini_batch_size=6).check_trainer(trainer)
    data.batch_size = 8
    TeacherRollouts(mini_batch_size=4).check_trainer(trainer)


def test_the_other_batches_may_be_the_teachers_and_then_need_no_dataset(pair, tmp_path) -> None:
    never = StudentRollouts(on_policy_fraction=0.0, max_new_tokens=8, seed=5, off_policy="teacher")
    prompts = {"responses": False}
    gkd, shown = fit(pair, tmp_path, never, {"kd": ForwardKL()}, data=prompts)
    teacher, _ = fit(pair, tmp_path, TeacherRollouts(max_new_tokens=8, seed=5), {"kd": ForwardKL()}, data=prompts)
    assert torch.equal(weights(gkd), weights(teacher))
    assert not shown.trajectories  # callbacks compare the student with itself
    replay = ReplayRollouts(0.5, increment=0.0, max_new_tokens=8, off_policy="teacher")
    learner, _ = fit(pair, tmp_path, replay, {"kd": ForwardKL()}, data=prompts)
    assert learner.global_step == 4


@pytest.mark.parametrize("source", [StudentRollouts(0.5), ReplayRollouts(0.5, increment=0.0)], ids=["gkd", "replay"])
def test_the_dataset_must_have_the_responses_of_the_other_batches(pair, tmp_path, source) -> None:
    with pytest.raises(
        ValueError, match=r"off_policy: some batches of \w+ are the responses of the dataset.*off_policy: teacher"
    ):
        fit(pair, tmp_path, source, {"kd": ForwardKL()}, data={"responses": False})


def test_sampling_is_not_differentiated_and_the_responses_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="on_policy_fraction: expected a share"):
        StudentRollouts(on_policy_fraction=1.2)
    with pytest.raises(ValueError, match="off_policy: expected dataset or teacher, got 'student'"):
        StudentRollouts(off_policy="student")
    with pytest.raises(
        ValueError, match=r"off_policy: teacher, but with on_policy_fraction: 1 every batch is the student's"
    ):
        StudentRollouts(off_policy="teacher")
    with pytest.raises(ValueError, match="mini_batch_size: expected at least 1"):
        TeacherRollouts(mini_batch_size=0)
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
