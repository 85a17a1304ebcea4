"""Several teachers: each for its own items, or all as a mixture."""

from __future__ import annotations

import pytest
import torch
from loaded import LoadedOnes, frozen, routed_text

from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM
from lit_distill.objectives import ForwardKL, LossTerm, NextToken, ReverseKL, term_means
from lit_distill.teachers import MixedTeachers, RoutedTeachers
from lit_distill.teachers.base import PartedRows
from lit_distill.types import Sequences

NAMES = ["a", "b", "b", "a", "b"]


def routed(**settings) -> RoutedTeachers:
    teachers = {name: LoadedOnes(frozen(seed)) for seed, name in enumerate("ab", start=1)}
    made = RoutedTeachers(teachers, **{"column": "teacher", **settings})
    made.load(None, None)
    return made


def gradients(student: CausalLM, teacher, text, factor: float = 1.0, objective=None):
    student.zero_grad()
    evaluator = ObjectiveEvaluator({"kd": objective or ForwardKL()}, student, teacher, "model.objectives", chunk_rows=7)
    loss, terms = evaluator(text, {"kd": factor})
    loss.backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()]), terms


@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL()])
def test_two_routed_teachers_give_the_sum_of_the_gradients_of_two_single_runs(student, objective) -> None:
    teacher, text = routed(), routed_text(NAMES)
    together, terms = gradients(student, teacher, text, objective=objective)
    apart = torch.zeros_like(together)
    for name in "ab":
        rows = torch.tensor([row for row, own in enumerate(NAMES) if own == name])
        gradient, own = gradients(student, teacher.loaded[name], text.select(rows), objective=objective)
        apart += gradient
        torch.testing.assert_close(terms[f"kd/{name}"].total, own["kd"].total)
        assert terms[f"kd/{name}"].count == own["kd"].count
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6 * float(apart.abs().max()))


def test_only_the_teachers_of_a_batch_run(student) -> None:
    teacher, text = routed(), routed_text(["b", "b"])
    teacher.loaded["a"] = None  # type: ignore[assignment]  # it would fail
    _, terms = gradients(student, teacher, text)
    assert terms["kd/a"].count == 0
    assert terms["kd/b"].count == terms["kd"].count


def test_terms_of_a_teacher_are_means_over_its_own_tokens(student) -> None:
    _, terms = gradients(student, routed(), routed_text(NAMES))
    counts = {"kd": torch.tensor(float(terms["kd"].count))}
    means = term_means(terms, counts, lambda values: values)
    for name in "ab":
        torch.testing.assert_close(means[f"kd/{name}"], terms[f"kd/{name}"].total / terms[f"kd/{name}"].count)
    share = terms["kd/a"].count / terms["kd"].count
    torch.testing.assert_close(means["kd"], share * means["kd/a"] + (1 - share) * means["kd/b"])


def test_an_objective_without_a_teacher_counts_every_token_once(student) -> None:
    text = routed_text(NAMES)
    evaluator = ObjectiveEvaluator({"kd": ForwardKL(), "ce": NextToken()}, student, routed(), "model.objectives", 5)
    _, terms = evaluator(text, {"kd": 1.0, "ce": 1.0})
    assert set(terms) == {"kd", "kd/a", "kd/b", "ce"}
    assert terms["ce"].count == int(text.target_mask.sum())


def test_rows_are_in_the_order_of_the_targets() -> None:
    teacher, text = routed(), routed_text(NAMES)
    rows = teacher.rows(text)
    assert isinstance(rows, PartedRows)
    labels = text.input_ids[text.target_mask]
    expected = torch.cat(
        [teacher.loaded[name].rows(text.slice(row, row + 1)).logits(slice(0, 99)) for row, name in enumerate(NAMES)]
    )
    torch.testing.assert_close(rows.logits(slice(3, 20)), expected[3:20])
    scores = expected.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(rows.label_logprobs(labels), scores)


def test_a_pattern_in_the_prompt_decides() -> None:
    teacher = routed(column=None, patterns={"a": r"\d \+ \d", "b": "translate"}, default="b")
    prompts = ["2 + 3 = ", "please translate", "something else"]
    items = [routed_text(["x"], student_prompt=prompt).items[0] for prompt in prompts]
    assert [teacher.teacher_of(item) for item in items] == ["a", "b", "b"]


def test_an_item_without_a_teacher_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"teacher\.init_args\.default: the item 'item-1' has no teacher: .* 'c'.* a, b"
    ):
        routed().rows(routed_text(["a", "c"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column": None}, r"column: give either column or patterns"),
        ({"patterns": {"a": "x"}}, r"column: give either column or patterns"),
        ({"default": "c"}, r"default: there is no teacher 'c', only a, b"),
        ({"column": None, "patterns": {"c": "x"}}, r"patterns: there is no teacher 'c'"),
        ({"column": None, "patterns": {"a": "("}}, r"patterns: '\(' is no regular expression"),
    ],
)
def test_wrong_settings_are_named(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        routed(**settings)


def test_a_mixture_is_the_weighted_mean_of_the_probabilities() -> None:
    loaded = {name: frozen(seed) for seed, name in enumerate("abc")}
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    teacher = MixedTeachers({name: LoadedOnes(one) for name, one in loaded.items()}, weights)
    teacher.load(None, None)
    text = routed_text(NAMES)
    rows = teacher.rows(text)
    every = slice(0, int(text.target_mask.sum()))
    expected = sum(weights[name] * one.rows(text).logits(every).softmax(-1) for name, one in loaded.items())
    torch.testing.assert_close(rows.logits(every).softmax(-1), expected)
    torch.testing.assert_close(rows.logits(every).logsumexp(-1), torch.zeros(every.stop), rtol=0, atol=1e-5)
    labels = text.input_ids[text.target_mask]
    torch.testing.assert_close(rows.label_logprobs(labels), expected.gather(1, labels[:, None])[:, 0].log())


@pytest.mark.parametrize("weights", [{"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 1.0, "b": 0.0}])
def test_weights_that_are_no_mixture_are_refused(weights) -> None:
    with pytest.raises(ValueError, match=r"^weights: expected"):
        MixedTeachers({name: LoadedOnes(frozen(1)) for name in "ab"}, weights)


@pytest.mark.parametrize(
    ("accuracies", "mixed"),
    [
        (("exact", "exact"), "exact"),
        (("exact", "spread"), "spread"),
        (("truncated", "truncated"), "truncated"),
        (("truncated", "exact"), "spread"),
        (("drawn", "exact"), "drawn"),
    ],
)
def test_a_mixture_is_as_exact_as_its_teachers(accuracies, mixed) -> None:
    teachers = {name: LoadedOnes(frozen(1), accuracy) for name, accuracy in zip("ab", accuracies, strict=True)}
    assert MixedTeachers(teachers).accuracy == mixed


def test_items_are_divided_once_and_nothing_is_kept_of_a_step(student, monkeypatch) -> None:
    teacher, text = routed(), routed_text(NAMES)
    calls = []
    monkeypatch.setattr(teacher._shares, "_compute", lambda texts: calls.append(1) or teacher._split(texts))
    evaluator = ObjectiveEvaluator({"kd": ForwardKL(), "ce": NextToken()}, student, teacher, "model.objectives", 5)
    evaluator.prefetch(text, {"kd"})
    evaluator.counts([text], ["kd", "ce"])
    evaluator(text, {"kd": 1.0, "ce": 1.0})
    assert calls == [1]
    assert not teacher._shares._known


def test_texts_without_records_are_counted_for_objectives_without_a_teacher(student) -> None:
    text, teacher = routed_text(NAMES), routed()
    corpus = Sequences(text.input_ids, text.attention_mask, text.target_mask)
    evaluator = ObjectiveEvaluator({"ce": NextToken()}, student, teacher, "model.corpus_objectives", 5)
    assert int(evaluator.counts([corpus], ["ce"])["ce"]) == int(text.target_mask.sum())
    with pytest.raises(ValueError, match=r"^model\.teacher: RoutedTeachers needs items with a record"):
        teacher.rows(corpus)


def test_a_teacher_without_tokens_has_no_mean() -> None:
    one, none = LossTerm(torch.tensor(3.0), 2), LossTerm(torch.tensor(0.0), 0)
    means = term_means({"kd": one, "kd/a": one, "kd/b": none}, {"kd": torch.tensor(2.0)}, lambda sums: sums)
    assert means["kd"] == means["kd/a"] == 1.5
    assert means["kd/b"].isnan()
