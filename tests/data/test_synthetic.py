"""The generated tasks: right answers, splits that never meet, the same bytes everywhere, a tokenizer that fits them."""

from __future__ import annotations

import hashlib
import json
import random
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lit_distill.data import ProceduralData
from lit_distill.data.synthetic import tasks as procedural
from lit_distill.data.synthetic.tasks import KINDS, generate_corpus, generate_instructions, splits

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "lit_distill" / "assets"


@pytest.fixture(scope="module")
def records():
    return generate_instructions(7, 3000)


def kind_of(record):
    return re.fullmatch(r"(?:train|validation|test)-(.+)-\d{6}", record["id"]).group(1)


def answer(question, text):
    """The answer by pattern, from the text alone."""
    facts = re.findall(r"(\w+) from (\w+) has a (\w+) (\w+)\.", text)
    asked = re.split(r"\W+", question)
    name, place, colour, animal = next(fact for fact in facts if fact[0] in asked or fact[3] in asked)
    return {
        "Where": f"{name} is from {place}.",
        "What": f"{name} has a {colour} {animal}.",
        "Who": f"{name} has the {animal}.",
        "Which": f"The {animal} is {colour}.",
    }[asked[0]]


SOLVERS = {
    "add": lambda _, text: str(sum(int(number) for number in re.findall(r"\d+", text))),
    "larger": lambda _, text: str(np.max([int(number) for number in text.split()])),
    "sort-numbers": lambda _, text: " ".join(str(n) for n in np.sort([int(number) for number in text.split()])),
    "sort-words": lambda _, text: " ".join(np.sort(text.split())),
    "reverse-words": lambda _, text: " ".join(text.split()[::-1]),
    "reverse-letters": lambda _, text: text[::-1],
    "repeat": lambda _, text: text,
    "uppercase": lambda _, text: "".join(chr(ord(c) - 32) if c != " " else c for c in text),
    "pick": lambda ask, text: dict(zip(("first", "second", "last"), np.array(text.split())[[0, 1, -1]], strict=True))[
        ask.split()[2]
    ],
    "count": lambda ask, text: str(Counter(text.split())[ask.split()[3]]),
    "answer": answer,
}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"describe", "story"}))
def test_the_answer_is_right(records, kind):
    found = [record for record in records if kind_of(record) == kind]
    assert len(found) > 100
    for record in found:
        assert record["output"] == SOLVERS[kind](record["instruction"], record["input"]), record


def test_open_ended_answers_speak_of_their_input_and_vary_in_length(records):
    lengths = set()
    for record in records:
        if kind_of(record) in {"describe", "story"}:
            name, animal = record["input"].split(", ")[0], record["input"].split(", ")[1].split()[1]
            assert name in record["output"] or animal in record["output"]
            lengths.add(record["output"].count("."))
    assert lengths == {2, 3, 4}


def test_no_input_is_in_two_splits_whatever_the_seeds():
    asked = {
        (seed, split): {(record["instruction"], record["input"]) for record in items}
        for seed in (1, 2)
        for split, items in splits(seed, 3000, 500, 500).items()
    }
    for (_, split), these in asked.items():
        for (_, other), those in asked.items():
            assert split == other or not these & those


def test_no_item_comes_twice(records):
    assert len({(record["instruction"], record["input"]) for record in records}) == len(records)
    assert len({record["id"] for record in records}) == len(records)


def test_a_smaller_count_is_a_prefix_of_a_larger_one(records):
    assert generate_instructions(7, 100) == records[:100]


def test_other_seeds_give_other_items(records):
    assert generate_instructions(8, 100) != records[:100]


def test_the_items_are_the_same_on_every_platform_and_version():
    content = json.dumps([generate_instructions(0, 500), generate_corpus(0, 100)])
    assert (
        hashlib.sha256(content.encode()).hexdigest()
        == "c1b33e548cd71d5de123cbc0f0e2e970f2423cef6cba9e4e1e1e753a07111627"
    )


def test_only_random_is_drawn_from(monkeypatch, records):
    real = random.Random

    class OnlyRandom:
        def __init__(self, seed):
            self.random = real(seed).random

    monkeypatch.setattr(procedural.random, "Random", OnlyRandom)
    assert generate_instructions(7, 50) == records[:50]


def test_kinds_come_evenly(records):
    counts = Counter(kind_of(record) for record in records)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > 150
    assert max(counts.values()) < 350


def test_the_corpus_repeats_from_its_seed_and_ends_its_sentences():
    corpus = generate_corpus(3, 200)
    assert corpus == generate_corpus(3, 200)
    assert all(re.fullmatch(r"([A-Z][^.?]+[.?] ?)+", paragraph) for paragraph in corpus)


def test_too_many_items_are_refused():
    with pytest.raises(ValueError, match="ask for fewer items or add kinds"):
        generate_instructions(0, 5000, "test", kinds=["add"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split is 'dev'"),
        ({"kinds": ["ad"]}, r"kinds holds \['ad'\]"),
        ({"kinds": []}, "kinds is empty"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_instructions(0, 1, **arguments)


@pytest.mark.parametrize("name", ["num_train", "num_validation", "num_test"])
def test_an_empty_split_is_refused_by_its_key(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 1"):
        ProceduralData(**{name: 0})


def test_the_data_module_yields_prompts_and_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    data = ProceduralData(64, num_validation=8, num_test=8, tokenizer=str(ASSETS / "student"))
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    batch = next(iter(data.train_dataloader()))
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    by_id = {record["id"]: record for record in generate_instructions(0, 64)}
    assert len(batch) == 32
    for row, identity in enumerate(batch.ids):
        target = batch.sequences.input_ids[row][batch.sequences.target_mask[row]]
        assert tokenizer.decode(target) == by_id[identity]["output"] + tokenizer.eos_token
        assert batch.prompt_texts[row].endswith("\n" + by_id[identity]["input"] + "\n")
    assert all(identity.startswith("test-") for batch in data.test_dataloader() for identity in batch.ids)


def test_the_split_knows_its_content(records):
    one, same, other = (ProceduralData(10, task_seed=seed).read_split("train") for seed in (7, 7, 8))
    assert one.to_list() == records[:10]
    assert one._fingerprint == same._fingerprint != other._fingerprint


@pytest.mark.parametrize("text", ["red FOX, 12 + 3\n", " ä leading space", "東京 x²", "", "a  b "])
def test_the_tokenizer_gives_back_any_text(text):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_keeps_digits_words_padding_and_end_apart():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    assert len(tokenizer) == 512
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, None}) == 3
    assert len(tokenizer("123")["input_ids"]) == 4  # the space before a text and three digits
    assert tokenizer("bread fish")["input_ids"] == tokenizer("bread")["input_ids"] + tokenizer("fish")["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_the_shipped_tokenizers_are_what_the_tool_builds(tmp_path, monkeypatch, model):
    tool = ROOT / "tools" / "build_embedded_tokenizer.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "--output", str(tmp_path)])
    runpy.run_path(str(tool), run_name="__main__")
    assert (tmp_path / "tokenizer.json").read_bytes() == (ASSETS / model / "tokenizer.json").read_bytes()
