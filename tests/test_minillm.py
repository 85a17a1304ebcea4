"""MiniLLM through the Trainer: phases, inner epochs, schedules, and how much work a phase is."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from training import learner_of, quiet_trainer, weights

from lit_distill.callbacks import ObjectiveWeightSchedule, RolloutMonitor, TeacherMixSchedule
from lit_distill.data import Corpus, ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.models.caching import Caching
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL, NextToken, PolicyGradient, ReverseKL
from lit_distill.sources import TeacherMixedRollouts
from lit_distill.types import Trajectories

ROLLOUTS, NEW_TOKENS = 8, 12


class Witness(L.Callback):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.phases: list[Trajectories] = []
        self.alphas: list[float] = []
        self.figures: list[dict[str, float]] = []

    def on_rollouts(self, trainer: L.Trainer, pl_module: L.LightningModule, trajectories: Trajectories) -> None:
        self.phases.append(trajectories)
        self.alphas.append(trajectories.alpha)

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        self.figures.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(pair: tuple[Path, Path], folder: Path, steps: int = 8, callbacks=(), source=None, corpus=None, **settings):
    source = {"alpha": 0.3, "max_new_tokens": NEW_TOKENS, "mini_batch_size": 4, "inner_epochs": 2, **(source or {})}
    objectives = {"long": PolicyGradient(), "single": ReverseKL(importance_weighted=True)}
    learner, witness = learner_of(pair, objectives, TeacherMixedRollouts(**source), **settings), Witness()
    trainer = quiet_trainer(folder, steps, callbacks=[*callbacks, witness])
    data = ProceduralData(num_train=32, num_validation=4, num_test=4, batch_size=ROLLOUTS, corpus=corpus)
    data.responses = False  # prompts are all that is needed
    trainer.fit(learner, data)
    return learner, witness


def test_a_phase_is_inner_epochs_times_mini_batches_of_steps(pair, tmp_path) -> None:
    learner, witness = fit(pair, tmp_path, steps=8)
    assert learner.global_step == 8
    assert len(witness.phases) == 2  # of 2 epochs × 2 mini-batches each
    assert len(witness.phases[0].ids) == ROLLOUTS


def test_the_run_ends_at_max_steps_in_the_middle_of_a_phase(pair, tmp_path) -> None:
    learner, witness = fit(pair, tmp_path, steps=6)
    assert learner.global_step == 6
    assert len(witness.phases) == 2


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_change_neither_rollouts_nor_weights(pair, tmp_path, micro_batch_size: int) -> None:
    whole, _ = fit(pair, tmp_path, steps=4)
    split, _ = fit(pair, tmp_path, steps=4, micro_batch_size=micro_batch_size)
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=1e-6)


def test_the_same_seed_rolls_out_the_same_texts_and_another_seed_others(pair, tmp_path) -> None:
    runs = [fit(pair, tmp_path, steps=8, source={"seed": seed})[1].phases for seed in (1, 1, 2)]
    for first, second in zip(runs[0], runs[1], strict=True):
        assert torch.equal(first.responses.ids, second.responses.ids)
        assert torch.equal(first.signals["advantages"], second.signals["advantages"])
    assert runs[0][0].responses.ids.shape != runs[2][0].responses.ids.shape or not torch.equal(
        runs[0][0].responses.ids, runs[2][0].responses.ids
    )


def test_the_teachers_body_passes_once_over_each_rollout_token_however_many_inner_epochs(pair, tmp_path) -> None:
    seen = {"student": 0, "teacher": 0}

    class Counter(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: DistillationModule) -> None:
            for name, lm in (("student", pl_module.student), ("teacher", pl_module.teacher.lm)):
                lm.caching = Caching(works=True)  # found out before
                lm.register_forward_pre_hook(lambda _, args, n=name: seen.__setitem__(n, seen[n] + args[0].numel()))

    source = {"inner_epochs": 3, "mini_batch_size": ROLLOUTS, "shuffle": False}
    _, witness = fit(pair, tmp_path, steps=3, callbacks=[Counter()], source=source)
    (phase,) = witness.phases
    prompt = phase.prompts.input_ids.numel()
    width, length = phase.prompts.input_ids.shape[1], phase.responses.ids.shape[1]
    at_most = prompt + ROLLOUTS * (length - 1)
    assert at_most - ROLLOUTS * NEW_TOKENS <= seen["teacher"] <= at_most
    text = phase.sequences().slice(0, ROLLOUTS)
    learning = 3 * (text.input_ids if text.packed is None else text.packed.input_ids).numel()
    assert text.input_ids.shape[1] <= width + length
    assert at_most - ROLLOUTS * NEW_TOKENS + learning <= seen["student"] <= at_most + learning


def test_stored_teacher_rows_give_the_loss_of_a_teacher_that_runs_again(pair, tmp_path) -> None:
    learner, witness = fit(pair, tmp_path, steps=1, source={"mini_batch_size": ROLLOUTS})
    text = witness.phases[0].sequences()
    import dataclasses

    again = dataclasses.replace(text, teacher_hidden=None)
    with torch.no_grad():
        for rows in (slice(0, 8), slice(3, 5)):
            stored = learner._text(text.slice(rows.start, rows.stop), {"long": 0.0, "single": 1.0})[0]
            fresh = learner._text(again.slice(rows.start, rows.stop), {"long": 0.0, "single": 1.0})[0]
            torch.testing.assert_close(stored, fresh, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", [{"hidden_on_host": True}, {"decode_batch_size": ROLLOUTS}])
def test_where_the_hidden_rows_lie_changes_nothing(pair, tmp_path, setting: dict) -> None:
    plain, _ = fit(pair, tmp_path, steps=4)
    other, _ = fit(pair, tmp_path, steps=4, source=setting)
    assert torch.equal(weights(plain), weights(other))


def test_smaller_decoding_batches_throw_coins_of_their_own(pair, tmp_path) -> None:
    _, witness = fit(pair, tmp_path, steps=1, source={"decode_batch_size": 3, "alpha": 0.5})
    from_teacher = witness.phases[0].responses.from_teacher
    assert from_teacher.shape == witness.phases[0].responses.ids.shape
    assert not torch.equal(from_teacher[0], from_teacher[-1])


def test_the_corpus_rows_of_a_phase_are_shared_out_among_its_steps(pair, tmp_path) -> None:
    (tmp_path / "corpus.txt").write_text("Tom is a red cat.\n\n" * 60)
    corpus = Corpus(str(tmp_path / "corpus.txt"), length=16, batch_size=8)
    objectives = {"lm": NextToken(weight=0.5), "lm_kd": ForwardKL(weight=0.5)}
    _, witness = fit(pair, tmp_path, steps=4, corpus=corpus, corpus_objectives=objectives)
    figures = witness.figures[-1]
    parts = figures["train/long"] + figures["train/single"] + 0.5 * figures["train/lm"] + 0.5 * figures["train/lm_kd"]
    assert figures["train/loss"] == pytest.approx(parts, rel=1e-5)
    few = Corpus(str(tmp_path / "corpus.txt"), length=16, batch_size=3)
    with pytest.raises(ValueError, match=r"data\.init_args\.corpus\.batch_size: 3 rows .* 4 optimiser steps"):
        fit(pair, tmp_path, steps=4, corpus=few, corpus_objectives=objectives)


def test_the_mix_schedule_sets_alpha_before_each_phase(pair, tmp_path) -> None:
    schedule = TeacherMixSchedule("linear", start=1.0, end=0.0, steps=8)
    _, witness = fit(pair, tmp_path, steps=12, callbacks=[schedule])
    assert witness.alphas == [1.0, 0.5, 0.0]
    assert witness.phases[0].responses.from_teacher[witness.phases[0].responses.mask].all()
    assert not witness.phases[2].responses.from_teacher.any()


@pytest.mark.parametrize(("target", "rises"), [(1e-4, True), (1e4, False)])
def test_the_adaptive_mix_lets_the_teacher_speak_more_where_reverse_kl_is_above_its_target(
    pair, tmp_path, target, rises
) -> None:
    schedule = TeacherMixSchedule("adaptive", start=0.5, target=target, rate=0.1)
    _, witness = fit(pair, tmp_path, steps=8, callbacks=[schedule])
    assert (witness.alphas[1] > witness.alphas[0]) == rises
    assert 0 <= schedule.alpha <= 1
    restored = TeacherMixSchedule("adaptive", start=0.5, target=target)
    restored.load_state_dict(schedule.state_dict())
    assert restored.alpha == schedule.alpha


def test_the_weight_schedule_sets_the_weight_of_the_objective_it_names(pair, tmp_path) -> None:
    schedule = ObjectiveWeightSchedule("single", "stepwise", start=2.0, values={4: 0.25})
    _, witness = fit(pair, tmp_path, steps=8, callbacks=[schedule])
    assert [f["train/single/weight"] for f in witness.figures] == [2.0, 0.25]
    with pytest.raises(ValueError, match=r"there is no objective 'sinlge'\. Give one of: long, single"):
        fit(pair, tmp_path, callbacks=[ObjectiveWeightSchedule("sinlge", start=1.0, end=0.0)])


@pytest.mark.parametrize(
    ("shape", "monitor", "objective", "warned"),
    [
        ("linear", "val/loss", "kd", True),
        ("linear", "val/perplexity", "kd", False),
        ("constant", "val/loss", "kd", False),
        ("linear", "val/loss", "long", False),
    ],
)
def test_a_loss_whose_weights_change_is_no_good_monitor(shape, monitor, objective, warned: bool) -> None:
    schedule = ObjectiveWeightSchedule(objective, shape, start=1.0, end=0.0 if shape == "linear" else None)
    trainer = SimpleNamespace(callbacks=[schedule, SimpleNamespace(monitor=monitor)])
    module = SimpleNamespace(token_metrics=SimpleNamespace(trained={"kd": None}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        schedule.on_fit_start(trainer, module)
    assert [str(each.message).startswith("val/loss changes with the weight of 'kd'") for each in seen] == [
        True
    ] * warned


def test_the_monitor_reports_what_the_trajectories_say(pair, tmp_path) -> None:
    learner, witness = fit(pair, tmp_path, steps=4, callbacks=[RolloutMonitor()])
    phase, figures = witness.phases[0], witness.figures[0]
    mask = phase.responses.mask
    gap = phase.signals["old_logprobs"] - phase.signals["teacher_logprobs"]
    assert figures["rollout/reward"] == pytest.approx(-float(gap[mask].mean()), rel=1e-4, abs=1e-6)
    gap = gap[mask & ~phase.responses.from_teacher]  # drawn from the student, given what stood before
    assert 0 < len(gap) < mask.sum()
    assert figures["rollout/reverse_kl_k1"] == pytest.approx(float(gap.mean()), rel=1e-4, abs=1e-6)
    k3 = (-gap).exp() - 1 + gap
    assert figures["rollout/reverse_kl_k3"] == pytest.approx(float(k3.mean()), rel=1e-3, abs=1e-6)
    assert figures["rollout/response_length"] == pytest.approx(float(mask.sum(-1).float().mean()))
    w = phase.signals["importance_weights"][mask]
    assert figures["rollout/effective_sample_size"] == pytest.approx(
        float(w.sum() ** 2 / w.square().sum() / len(w)), rel=1e-5
    )
    assert figures["rollout/teacher_share"] == pytest.approx(float(phase.responses.from_teacher[mask].float().mean()))
    assert figures["rollout/student_entropy"] == pytest.approx(
        float(phase.responses.student_entropy[mask].mean()), rel=1e-5
    )
    ends = [int(row[m][-1]) in learner.stop_ids for row, m in zip(phase.responses.ids, mask, strict=True)]
    assert figures["rollout/unfinished"] == pytest.approx(1 - sum(ends) / len(ends))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alpha": 1.5}, r"alpha: expected the teacher's share, in \[0, 1\], got 1.5"),
        ({"top_k": 5}, "no valid importance weight"),
        ({"top_p": 0.9}, "no valid importance weight"),
        ({"temperature": 0.0}, "temperature: expected a number > 0"),
        ({"inner_epochs": 0}, "inner_epochs: expected at least 1"),
        ({"temperature": 0.7}, r"^objectives\.long\.temperature: 1.0, but .*temperature 0\.7"),
        ({"mini_batch_size": 9}, r"mini_batch_size: 9 .* data\.init_args\.batch_size"),
    ],
)
def test_settings_that_cannot_be_are_refused(pair, tmp_path, setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(pair, tmp_path, source=setting)


def test_without_a_teacher_nothing_can_be_mixed_in(pair) -> None:
    with pytest.raises(ValueError, match=r"^source: .*TeacherMixedRollouts.*model\.teacher\.path"):
        DistillationModule(ModelSpec(str(pair[0])), {"long": PolicyGradient()}, source=TeacherMixedRollouts())
