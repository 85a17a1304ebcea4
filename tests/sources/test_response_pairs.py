"""DPKD through the whole pipeline: its mean gradient over every pair of texts there is, and what `ResponsePairs` hands out."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from training import learner_of, quiet_trainer, weights

from lit_distill.callbacks import RolloutMonitor
from lit_distill.data import ProceduralData
from lit_distill.functional import direct_preference_loss
from lit_distill.generation import Decoder
from lit_distill.generation.sampling import phase_keys
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM, ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import DirectPreference, NextToken
from lit_distill.sources import ResponsePairs
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Batch, Pairs, Prompts, Sequences

STOP, STEPS, PROMPT = 0, 2, 1


def every_text() -> list[list[int]]:
    whole = itertools.product(range(3), repeat=STEPS)
    return [list(s) for s in sorted({s[: s.index(STOP) + 1] if STOP in s else s for s in whole})]


def logprob(lm: CausalLM, text: list[int]) -> Tensor:
    whole = torch.tensor([[PROMPT, *text]])
    return lm.model(input_ids=whole).logits[0, :-1].log_softmax(-1).gather(-1, whole[0, 1:, None]).sum()


def as_sequences(texts: list[list[int]]) -> Sequences:
    width = 1 + max(map(len, texts))
    ids = torch.tensor([[PROMPT, *text, *[0] * (width - 1 - len(text))] for text in texts])
    attended = torch.arange(width) < torch.tensor([[1 + len(text)] for text in texts])
    return Sequences(ids, attended.long(), attended & (torch.arange(width) > 0))


def gradients_of_pairs(student: CausalLM, teacher: FrozenTeacher, **settings) -> tuple[Tensor, Tensor]:
    """The mean gradient over y_t from the teacher and y_s from the student: through the pipeline, and by float64 autograd."""
    pairs = list(itertools.product(every_text(), repeat=2))
    wide, frozen = copy.deepcopy(student).double(), copy.deepcopy(teacher.lm).double()
    measure = ObjectiveEvaluator(
        {"dpkd": DirectPreference(**settings)}, student, teacher, "model.objectives", chunk_rows=2
    )
    total, exact = 0.0, []
    for chosen, rejected in pairs:
        q_t, q_s, p_t, p_s = (logprob(lm, text)[None] for lm in (wide, frozen) for text in (chosen, rejected))
        probability = float((p_t + q_s).exp().detach())
        total += probability
        lengths = (torch.tensor([len(text)]) for text in (chosen, rejected))
        exact.append(probability * direct_preference_loss(q_t, q_s, p_t, p_s, *lengths, **settings).sum())
        loss, _ = measure(Pairs(as_sequences([chosen]), as_sequences([rejected])), {"dpkd": probability})
        loss.backward()
    assert total == pytest.approx(1.0)
    expected = torch.autograd.grad(sum(exact), list(wide.parameters()))
    ours = torch.cat([p.grad.flatten() for p in student.parameters()])
    return ours, torch.cat([g.flatten() for g in expected]).float()


@pytest.fixture
def models(make_model) -> tuple[CausalLM, FrozenTeacher]:
    student, teacher = (make_model("llama", 1, seed=s, vocab_size=3) for s in (0, 4))
    return CausalLM(student), FrozenTeacher(CausalLM(teacher))


@pytest.mark.parametrize("settings", [{}, {"length_normalize": False}, {"variant": "ipo"}, {"variant": "cpo"}])
def test_the_mean_gradient_over_every_pair_is_that_of_the_exact_loss(models, settings: dict) -> None:
    ours, exact = gradients_of_pairs(*models, **settings)
    assert float((ours - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("length_normalize", [True, False])
def test_where_student_and_teacher_agree_the_mean_gradient_is_zero_though_no_pairs_is(
    make_model, length_normalize
) -> None:
    def twin() -> CausalLM:
        return CausalLM(make_model("llama", 1, seed=3, vocab_size=3))

    student, teacher = twin(), FrozenTeacher(twin())
    ours, exact = gradients_of_pairs(student, teacher, length_normalize=length_normalize)
    assert ours.abs().max() < 1e-6
    assert exact.abs().max() < 1e-6
    student.zero_grad()
    measure = ObjectiveEvaluator({"dpkd": DirectPreference()}, student, teacher, "model.objectives")
    measure(Pairs(as_sequences([[1, 2]]), as_sequences([[2, 1]])), {"dpkd": 1.0})[0].backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters()) > 1e-3


class Witness(L.Callback):
    """What the objectives were shown, and what was rolled out."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, Pairs]] = []
        self.said: list[tuple[int, list[list[int]]]] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        measure = pl_module._text._evaluate_pairs

        def watched(pairs, *args):
            self.pairs.append((pl_module.global_step, pairs))
            return measure(pairs, *args)

        pl_module._text._evaluate_pairs = watched

    def on_rollouts(self, trainer, pl_module, trajectories) -> None:
        self.said.append((pl_module.global_step, trajectories.responses.ids.tolist()))


def fit(pair: tuple[Path, Path], folder: Path, source: ResponsePairs, steps: int = 4, batch_size: int = 6, **settings):
    objectives = {"dpkd": DirectPreference(weight=0.5), "ce": NextToken(weight=0.5)}
    learner, witness = learner_of(pair, objectives, source, lr=0.5, **settings), Witness()
    trainer = quiet_trainer(folder, steps, callbacks=[RolloutMonitor(), witness])
    trainer.fit(learner, ProceduralData(num_train=24, num_validation=4, num_test=4, batch_size=batch_size))
    return learner, witness, trainer


def test_the_students_texts_are_rejected_and_the_datasets_chosen(pair, tmp_path) -> None:
    learner, witness, trainer = fit(pair, tmp_path, ResponsePairs(max_new_tokens=8, shuffle=False))
    assert [step for step, _ in witness.said] == [0, 1, 2, 3]
    for (_, pairs), (_, said) in zip(witness.pairs, witness.said, strict=True):
        rejected = [
            ids[mask].tolist() for ids, mask in zip(pairs.rejected.input_ids, pairs.rejected.target_mask, strict=True)
        ]
        assert rejected == [row[: len(tokens)] for row, tokens in zip(said, rejected, strict=True)]
        assert all(
            ids[mask][-1] == learner.tokenizer.eos_token_id
            for ids, mask in zip(pairs.chosen.input_ids, pairs.chosen.target_mask, strict=True)
        )
    logged = {name.removeprefix("train/dpkd/") for name in trainer.callback_metrics if "dpkd/" in name}
    assert logged == {"reward_chosen", "reward_rejected", "margin", "accuracy", "chosen_logprob", "rejected_logprob"}


def test_of_a_conversation_the_answer_to_the_prompt_is_chosen_and_no_earlier_turn() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 0]])
    text = Sequences(ids, (ids > 0).long(), torch.tensor([[False, True, False, True, True], [True] * 4 + [False]]))
    prompts = Prompts(torch.tensor([[1, 2, 3], [0, 1, 2]]), torch.tensor([[1, 1, 1], [0, 1, 1]]))
    chosen = ResponsePairs()._last_responses(Batch(("a", "b"), prompts=prompts), text)
    assert chosen.target_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]
    unanswered = Prompts(ids[:1], torch.ones_like(ids[:1]))
    with pytest.raises(ValueError, match="a ends with its prompt"):
        ResponsePairs()._last_responses(Batch(("a",), prompts=unanswered), text.slice(0, 1))


def test_a_teacher_that_is_chosen_answers_live_and_not_with_the_students_dice(pair, tmp_path) -> None:
    _, witness, _ = fit(pair, tmp_path, ResponsePairs("teacher", max_new_tokens=8), steps=1)
    _, greedy, _ = fit(pair, tmp_path, ResponsePairs("teacher", max_new_tokens=8, temperature=0.0), steps=1)
    for _, pairs in (*witness.pairs, *greedy.pairs):
        chosen, rejected = (t.input_ids[t.target_mask].tolist() for t in (pairs.chosen, pairs.rejected))
        assert chosen != rejected
    _, same, _ = fit((pair[0], pair[0]), tmp_path, ResponsePairs("teacher", max_new_tokens=8), steps=1)
    ((_, pairs),) = same.pairs
    assert (
        pairs.chosen.input_ids[pairs.chosen.target_mask].tolist()
        != pairs.rejected.input_ids[pairs.rejected.target_mask].tolist()
    )


def test_the_same_seed_says_the_same_and_micro_batches_change_nothing(pair, tmp_path) -> None:
    whole, said, _ = fit(pair, tmp_path, ResponsePairs(max_new_tokens=8, seed=4))
    split, again, _ = fit(pair, tmp_path, ResponsePairs(max_new_tokens=8, seed=4), micro_batch_size=2)
    _, others, _ = fit(pair, tmp_path, ResponsePairs(max_new_tokens=8, seed=5, decode_batch_size=4))
    assert said.said == again.said
    assert said.said != others.said
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=1e-6)


def test_a_phase_is_inner_epochs_of_mini_batches_scored_by_the_teacher_once(pair, tmp_path, monkeypatch) -> None:
    tokens: Counter = Counter()
    body = CausalLM.forward

    def counted(self, *args, **named):
        tokens["teacher"] += self.config.hidden_size == 24
        return body(self, *args, **named)

    train = DistillationModule.on_fit_start

    def start(module) -> None:
        train(module)
        tokens.clear()  # some rows are read when a model is loaded

    monkeypatch.setattr(CausalLM, "forward", counted)
    monkeypatch.setattr(DistillationModule, "on_fit_start", start)
    source = ResponsePairs(max_new_tokens=8, mini_batch_size=2, inner_epochs=3)
    _, witness, _ = fit(pair, tmp_path, source, steps=12, batch_size=4)
    assert source.steps_per_batch(4) == 6
    assert [step for step, _ in witness.said] == [0, 6]
    assert [step for step, _ in witness.pairs] == list(range(12))
    assert tokens["teacher"] == 2
    first_phase = Counter(tuple(row) for _, p in witness.pairs[:6] for row in p.chosen.input_ids.tolist())
    assert set(first_phase.values()) == {3}


def test_scores_taken_once_are_those_of_a_teacher_that_runs_each_time(pair, tmp_path) -> None:
    once, _, _ = fit(
        pair, tmp_path, ResponsePairs(max_new_tokens=8, inner_epochs=2, shuffle=False, decode_batch_size=2)
    )

    class Unscored(ResponsePairs):
        def _scored(self, pairs, teacher):
            return pairs

    each, _, _ = fit(pair, tmp_path, Unscored(max_new_tokens=8, inner_epochs=2, shuffle=False, decode_batch_size=2))
    torch.testing.assert_close(weights(once), weights(each), rtol=0, atol=1e-6)


def test_with_a_batch_as_large_as_the_data_the_students_texts_are_written_once_an_epoch(pair, tmp_path) -> None:
    source = ResponsePairs(max_new_tokens=4, mini_batch_size=6, decode_batch_size=8)
    _, witness, trainer = fit(pair, tmp_path, source, steps=8, batch_size=24)
    assert [step for step, _ in witness.said] == [0, 4]
    assert trainer.current_epoch == 2


def test_what_cannot_be_is_refused(pair) -> None:
    specs = ModelSpec(str(pair[0])), ModelSpec(str(pair[1]))
    with pytest.raises(ValueError, match="the student generate responses that no objective uses"):
        DistillationModule(specs[0], {"ce": NextToken()}, specs[1], ResponsePairs())
    with pytest.raises(ValueError, match=r"needs a teacher\. Set model\.teacher\.path"):
        DistillationModule(specs[0], {"s": DirectPreference(variant="simpo")}, None, ResponsePairs("teacher"))
    with pytest.raises(ValueError, match=r"^inner_epochs: expected at least 1, got 0"):
        ResponsePairs(inner_epochs=0)
    DistillationModule(specs[0], {"s": DirectPreference(variant="simpo")}, None, ResponsePairs())


@pytest.mark.parametrize("rank_by", ["mean", "sum"])
def test_ranked_pairs_are_the_teachers_most_and_least_probable_response(pair, tmp_path, rank_by) -> None:
    source = ResponsePairs("ranked", num_responses=5, rank_by=rank_by, max_new_tokens=5, shuffle=False, seed=3)
    learner, witness = learner_of(pair, {"dpkd": DirectPreference()}, source), Witness()
    data = ProceduralData(6, num_validation=2, num_test=2, batch_size=6)
    quiet_trainer(tmp_path, 1, callbacks=[witness]).fit(learner, data)
    ((_, pairs),) = witness.pairs
    teacher = learner.teacher.lm.model
    batch = next(iter(data.train_dataloader()))
    start = CausalLM(type(learner.student.model).from_pretrained(pair[0]))
    texts = {}
    decoder = Decoder(start, learner.stop_ids)
    for n in range(5):
        out = decoder.generate(batch.prompts, phase_keys(f"0/candidate {n}", batch.ids), source.sampling, 3)
        for row, item in enumerate(batch.ids):
            ids = out.ids[row][out.mask[row]]
            prompt = batch.prompts.input_ids[row][batch.prompts.attention_mask[row].bool()]
            whole = torch.cat([prompt, ids])[None]
            scores = teacher(input_ids=whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total = float(scores.gather(-1, ids[:, None]).sum())
            texts.setdefault(item, []).append((total / (len(ids) if rank_by == "mean" else 1), ids.tolist()))
    for role, best in (("chosen", max), ("rejected", min)):
        text = getattr(pairs, role)
        for row, item in enumerate(text.items):
            found = text.input_ids[row][text.target_mask[row]].tolist()
            assert found == best(texts[item.id])[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_responses": 1}, "num_responses: ranked needs at least 2"),
        ({"temperature": 0.0}, "num_responses: ranked needs at least 2 different responses"),
        ({"rank_by": "median"}, "rank_by: expected mean or sum"),
    ],
)
def test_settings_that_cannot_rank_are_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        ResponsePairs("ranked", **settings)


def test_ranked_pairs_need_a_teacher(pair) -> None:
    with pytest.raises(ValueError, match="source: the source ResponsePairs needs a teacher"):
        DistillationModule(
            ModelSpec(str(pair[0])), {"a": DirectPreference(variant="cpo")}, source=ResponsePairs("ranked")
        )


def test_a_prompt_with_one_and_the_same_response_is_left_out(pair, tmp_path) -> None:
    source = ResponsePairs(
        "ranked", num_responses=2, max_new_tokens=4, temperature=1e-4
    )  # always the most probable token
    learner, witness = learner_of(pair, {"dpkd": DirectPreference()}, source), Witness()
    with pytest.warns(UserWarning, match="model.objectives.dpkd: it counted no item in step 1"):
        quiet_trainer(tmp_path, 1, callbacks=[witness]).fit(
            learner, ProceduralData(4, num_validation=2, num_test=2, batch_size=4)
        )
    ((_, pairs),) = witness.pairs
    assert not pairs.chosen.target_mask.any()
    assert not pairs.rejected.target_mask.any()
