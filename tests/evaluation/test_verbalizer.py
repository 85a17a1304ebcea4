"""Probabilities of label words are those of the whole model's own logits; what cannot be asked is refused by its key."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import VOCABULARY

from lit_distill.distributed import DataRanks
from lit_distill.evaluation.verbalizer import Verbalizer, VerbalizerTask
from lit_distill.evaluation.word_tree import WordTree
from lit_distill.models import CausalLM
from lit_distill.teachers import FrozenTeacher

CPU = torch.device("cpu")
WORDS = {
    "single": [[7], [9], [30]],
    "long": [[7, 8], [9, 8, 11], [7, 12, 5]],
    "mixed": [[30], [7, 7], [7, 8, 7]],
}


def slow_logprobs(model, prompt: list[int], word: list[int]) -> float:
    """One forward of transformers' own model over one text, without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + word])).logits[0].double()
    rows = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return sum(float(rows[i, token]) for i, token in enumerate(word))


def asker(words: list[list[int]]) -> VerbalizerTask:
    task = VerbalizerTask.__new__(VerbalizerTask)
    task.tree, task.pad_id = WordTree(words, [str(word) for word in words]), 2
    return task


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_word_probabilities_equal_the_models_own_on_ragged_prompts(make_model, family, words) -> None:
    model = make_model(family)
    prompts = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in (3, 9, 1, 6)]
    with torch.no_grad():
        ours = asker(words).word_logprobs(FrozenTeacher(CausalLM(model)), prompts, CPU)
    slow = [[slow_logprobs(model, prompt, word) for word in words] for prompt in prompts]
    torch.testing.assert_close(ours, torch.tensor(slow, dtype=torch.float32), rtol=1e-4, atol=1e-4)


def test_words_of_one_token_take_one_text_and_one_row_of_logits() -> None:
    tree = WordTree(WORDS["single"], "abc")
    assert len(tree.rows) == len(tree.places) == 1
    tree = WordTree(WORDS["long"], "abc")
    assert len(tree.rows) == 2  # (7, 12, 5) passes the beginnings of (7, 8) too
    assert len(tree.places) == 1 + 4  # "", 7, 9, (9, 8), (7, 12); the last token of a word predicts nothing
    assert len(WordTree([[7, 8], [7, 9]], "ab").rows) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([[7], []], "the tokenizer gives no tokens for 'b'"),
        ([[7], [7]], "'a' and 'b' are the same tokens"),
        ([[7, 8], [7]], "the tokens of 'b' .* are the beginning of those of 'a'"),
    ],
)
def test_words_that_cannot_be_told_apart_are_refused(words, said) -> None:
    with pytest.raises(ValueError, match=rf"^words: {said}"):
        WordTree(words, "ab")


@pytest.fixture
def tokenizer(pair):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pair[0])


@pytest.fixture
def model(pair):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pair[0]).eval()


def records(folder, rows: list[dict]) -> str:
    path = folder / "mood.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mood(tmp_path) -> Verbalizer:
    texts = ("well", "rather bad, I think", "so so", "great", "never again in all my life", "fine", "ok")
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    return Verbalizer(records(tmp_path, rows), "Say: {text}\nMood:", [" sad", " glad"], batch_size=2)


def test_figures_are_those_of_the_renormalised_probabilities(mood, tokenizer, model) -> None:
    result = VerbalizerTask(mood, tokenizer, 4).ask(CausalLM(model), CPU)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in mood.words]
    right, mass, brier = [], [], []
    for line in Path(mood.path).read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Say: {row['text']}\nMood:")["input_ids"]
        raw = torch.tensor([slow_logprobs(model, prompt, word) for word in words]).exp()
        p = raw / raw.sum()
        mass.append(raw.sum())
        right.append(float(p.argmax() == row["label"]))
        brier.append(sum((p[v] - float(v == row["label"])) ** 2 for v in range(2)))
    expected = {"accuracy": right, "mass": mass, "brier": brier}
    for name, values in expected.items():
        torch.testing.assert_close(result.metrics[name], torch.tensor(values).mean(), rtol=1e-4, atol=1e-6)
    assert result.count == 7


def test_ranks_share_the_questions_without_loss_or_duplicates(mood, tokenizer, model, monkeypatch) -> None:
    task, lm = VerbalizerTask(mood, tokenizer, 4), CausalLM(model)
    forwards, metrics = [], []
    model.base_model.register_forward_hook(lambda *_: forwards.append(1))

    def keep(metric) -> None:
        metrics.append(metric)

    monkeypatch.setattr("lit_distill.evaluation.verbalizer.CalibrationMetric.compute", keep)
    for world in (1, 2, 3, 8):  # 8 ranks for 7 questions
        metrics.clear()
        numbers = []
        for rank in range(world):
            forwards.clear()
            task.ask(lm, CPU, DataRanks(rank, world))
            numbers.append(len(forwards))
        assert len(set(numbers)) == 1  # a sharded model waits for all ranks at every forward
        confidences = torch.cat([part for metric in metrics for part in metric.confidences]).sort().values
        if world == 1:
            alone = confidences
        torch.testing.assert_close(confidences, alone, rtol=1e-5, atol=1e-6)


def test_a_label_is_an_index_or_a_word(tmp_path, tokenizer) -> None:
    task = Verbalizer("x", "{a}", ["no", " yes"])
    assert [task.label(value, "") for value in (0, 1, "no", "yes", " yes", True)] == [0, 1, 0, 1, 1, 1]
    for wrong in (2, -1, "maybe", None, 0.0, "1"):
        with pytest.raises(ValueError, match=r"line 3: the field `label` .* Correct it, or the task's words"):
            task.label(wrong, "file, line 3")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"words": [" sad"]}, r"words: expected at least two words"),
        ({"max_items": 0}, r"max_items: expected at least 1, or -1 for all, got 0"),
        ({"batch_size": 0}, r"batch_size: expected at least 1, got 0"),
        ({"template": "no field"}, r"template: 'no field'"),
        ({"template": "{nothing}"}, r"template: there is no field 'nothing' in the data. The fields are text"),
        ({"template": "chat"}, r"template: the template is 'chat'"),
        ({"label_field": "kind"}, r"label_field: there is no field 'kind'"),
        ({"path": "nowhere.jsonl"}, r"path: there is no file 'nowhere.jsonl'"),
        ({"words": [" sad", " glad", " "], "template": "{text}"}, None),
    ],
)
def test_what_is_wrong_is_said_by_its_argument(mood, tokenizer, change, said) -> None:
    tokenizer.chat_template = None
    settings = {**vars(mood), **change}
    if said is None:
        VerbalizerTask(Verbalizer(**settings), tokenizer)
        return
    with pytest.raises(ValueError, match=f"^{said}"):
        VerbalizerTask(Verbalizer(**settings), tokenizer)


def test_a_missing_field_is_said_by_file_and_line(tmp_path, tokenizer) -> None:
    path = records(tmp_path, [{"text": "well", "label": 0}, {"text": None, "label": 1}])
    with pytest.raises(ValueError, match=r"mood.jsonl, line 2: the field `text` is missing"):
        VerbalizerTask(Verbalizer(path, "{text}", [" sad", " glad"]), tokenizer)


def test_a_prompt_that_the_model_cannot_read_is_refused(tmp_path, tokenizer, model) -> None:
    path = records(tmp_path, [{"text": "a b c " * 200, "label": 0}, {"text": "a", "label": 0}])
    task = VerbalizerTask(Verbalizer(path, "{text}", [" sad", " glad"]), tokenizer)
    with pytest.raises(ValueError, match=r"^template: the prompt of .*, line 1 has .* accepts 512"):
        task.ask(CausalLM(model), CPU)


def test_tokens_that_the_models_do_not_share_are_refused(model) -> None:
    tree = WordTree([[3], [9]], "ab")
    with pytest.raises(ValueError, match="student and teacher share only the first 5"):
        tree.logprobs(torch.zeros(1, 1, 16), SimpleNamespace(weight=torch.zeros(5, 16)))


def test_a_few_items_are_spread_over_the_file(tmp_path, tokenizer) -> None:
    path = records(tmp_path, [{"text": "a", "label": int(i >= 50)} for i in range(100)])
    task = VerbalizerTask(Verbalizer(path, "{text}", [" sad", " glad"], max_items=10), tokenizer)
    assert sorted(question.label for question in task.questions) == [0] * 5 + [1] * 5
