"""A teacher with another tokenizer: compared at aligned positions, over the shared tokens."""

from __future__ import annotations

import pytest
import torch
from tiny import ASSETS, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_distill.data.collate import pad_sequences
from lit_distill.data.synthetic.tasks import generate_instructions
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM, ModelSpec, load_tokenizer
from lit_distill.objectives import ForwardKL, NextToken, ReverseKL
from lit_distill.teachers import AlignedTeacher, FrozenTeacher, MixedTeachers, PromptedTeacher
from lit_distill.teachers.aligned import _Pair, shared_mass
from lit_distill.types import Item, Sequences

SPEC = ModelSpec(str(ASSETS / "student"))
RECORDS = generate_instructions(0, 200, "train")


@pytest.fixture(scope="module")
def own():
    return load_tokenizer(SPEC, "student")


@pytest.fixture(scope="module")
def other() -> PreTrainedTokenizerFast:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    built.train_from_iterator([f"{r['instruction']} {r['input']} {r['output']}" for r in RECORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|end|>")  # noqa: S106 - no password


def text_of(tokenizer, records=RECORDS[:6]) -> Sequences:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [f"{record['instruction']}\n{record['input']}\n" for record in records]
    pairs = [(ids(p), [*ids(r["output"]), tokenizer.eos_token_id]) for p, r in zip(prompts, records, strict=True)]
    text = pad_sequences(pairs, pad_id=0)
    items = tuple(Item(f"item-{n}", {"student_prompt": prompt}) for n, prompt in enumerate(prompts))
    return Sequences(text.input_ids, text.attention_mask, text.target_mask, items=items)


def aligned(own, other) -> AlignedTeacher:
    torch.manual_seed(4)
    made = AlignedTeacher(SPEC, max_length=400)
    made._pair = _Pair.of(own, other)
    lm = CausalLM(tiny_llama(24, vocabulary=len(other), max_position_embeddings=512))
    made._frozen = FrozenTeacher(lm)
    return made


@pytest.fixture(scope="module")
def student(own) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(tiny_llama(vocabulary=len(own), max_position_embeddings=512))


def evaluated(student, teacher, text, **objectives):
    student.zero_grad()
    evaluator = ObjectiveEvaluator(objectives, student, teacher, "model.objectives", chunk_rows=11)
    loss, terms = evaluator(text, dict.fromkeys(objectives, 1.0))
    loss.backward()
    counts = evaluator.counts([text], objectives)
    return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()]), terms, counts


@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL(temperature=2.0)])
def test_the_same_tokenizer_gives_the_ordinary_path_to_the_bit(own, student, objective) -> None:
    teacher, text = aligned(own, own), text_of(own)
    loss, gradient, _, _ = evaluated(student, teacher, text, kd=objective)
    plain, expected, _, _ = evaluated(student, teacher._frozen, text, kd=objective)
    assert torch.equal(loss, plain)
    assert torch.equal(gradient, expected)


def test_the_loss_is_the_divergence_over_the_shared_tokens_at_the_aligned_places(own, other, student) -> None:
    teacher, text = aligned(own, other), text_of(own)
    loss, _, terms, counts = evaluated(student, teacher, text, kd=ForwardKL(), ce=NextToken())
    shared = teacher._pair.shared
    total, number = torch.zeros(()), 0
    for row in range(len(text)):
        targets = text.target_mask[row].nonzero()[:, 0].tolist()
        response = [int(text.input_ids[row, place]) for place in targets]
        ends = [own.decode(response[: n + 1], skip_special_tokens=True) for n in range(len(response))]
        ids = [*other(ends[-1], add_special_tokens=False)["input_ids"], other.eos_token_id]
        theirs = [other.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]
        prompt = other(text.items[row].fields["student_prompt"], add_special_tokens=False)["input_ids"]
        seen = torch.tensor([[*prompt, *ids]])
        said = teacher._frozen.lm.model(seen).logits[0, len(prompt) - 1 : -1][:, shared.teacher_ids].log_softmax(-1)
        logits = student.model(text.input_ids[row : row + 1], attention_mask=text.attention_mask[row : row + 1]).logits
        for i, end in enumerate(ends):
            for j, other_end in enumerate(theirs):
                starts = (ends[i - 1] if i else "", theirs[j - 1] if j else "")
                last = (response[i] == own.eos_token_id, ids[j] == other.eos_token_id)
                if end == other_end and starts[0] == starts[1] and last[0] == last[1]:
                    ours = logits[0, targets[i] - 1][shared.student_ids].log_softmax(-1)
                    total = total + (said[j].exp() * (said[j] - ours)).sum()
                    number += 1
    assert 0 < number < int(text.target_mask.sum())
    assert terms["kd"].count == number == int(counts["kd"])
    assert int(counts["ce"]) == int(text.target_mask.sum())
    torch.testing.assert_close(terms["kd"].total, total.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, terms["kd"].total + terms["ce"].total, rtol=1e-5, atol=1e-5)


def test_the_coverage_is_counted(own, other, student) -> None:
    teacher, text = aligned(own, other), text_of(own)
    _, _, terms, _ = evaluated(student, teacher, text, kd=ForwardKL())
    assert teacher.coverage.aligned == terms["kd"].count
    assert teacher.coverage.tokens == int(text.target_mask.sum())


def test_the_end_of_a_response_is_aligned_with_the_teachers(own, other) -> None:
    teacher, text = aligned(own, other), text_of(own)
    rows = teacher.rows(text)
    last = (text.target_mask.sum(dim=1).cumsum(0) - 1).tolist()
    assert set(last) <= set(rows.parts[0].places.tolist())


def test_a_text_without_targets_adds_nothing(own, other, student) -> None:
    teacher, text = aligned(own, other), text_of(own).without_targets()
    assert teacher.num_answered(text) == 0
    loss, _, terms, _ = evaluated(student, teacher, text, kd=ForwardKL())
    assert float(loss) == 0
    assert terms["kd"].count == 0


def test_what_needs_every_token_is_refused_with_the_reason(own, other) -> None:
    teacher, text = aligned(own, other), text_of(own)
    labels = text.input_ids[text.target_mask]
    with pytest.raises(ValueError, match=r"does not answer for every token .* Use objectives on single tokens"):
        teacher.rows(text).label_logprobs(labels)
    with pytest.raises(ValueError, match=r"^teachers\.b: it does not answer for every token"):
        MixedTeachers({"a": SPEC, "b": teacher})


def test_a_text_that_is_too_long_is_named(own, other) -> None:
    teacher = aligned(own, other)
    teacher.max_length = 5
    with pytest.raises(
        ValueError, match=r"init_args\.max_length: the text of the item 'item-0' has \d+ of the teacher's"
    ):
        teacher.rows(text_of(own))


def test_the_shared_mass_is_the_probability_of_the_shared_tokens() -> None:
    logits = torch.randn(5, 9)
    ids = torch.tensor([1, 4, 5])
    torch.testing.assert_close(shared_mass(logits, ids), logits.softmax(-1)[:, ids].sum(-1))


def test_texts_are_aligned_once_for_their_count_and_their_rows(own, other, monkeypatch) -> None:
    teacher, text = aligned(own, other), text_of(own)
    calls = []
    monkeypatch.setattr(teacher._prepared, "_compute", lambda texts: calls.append(1) or teacher._aligned(texts))
    answered = teacher.num_answered(text)
    assert len(teacher.rows(text).parts[0].places) == answered
    assert calls == [1]
    assert not teacher._prepared._known


def test_an_aligned_teacher_behind_another_prompt_counts_the_aligned_targets(own, other, student) -> None:
    inner, text = aligned(own, other), text_of(own)
    outer = PromptedTeacher(inner)
    outer.loaded, outer._tokenizer = inner, own
    _, _, terms, counts = evaluated(student, outer, text, kd=ForwardKL(), ce=NextToken())
    assert int(counts["kd"]) == terms["kd"].count < int(counts["ce"])
