"""Broken data files, configs and command lines: the message names the key or the file, the place and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input.conftest import mixed, refused
from lightning.pytorch import Callback

from lit_distill.evaluation import Checker
from lit_distill.sources import Reward

GOOD = {"instruction": "Say it.", "output": "It."}
LINE = json.dumps(GOOD).encode() + b"\n"


def instructions(**arguments: Any) -> dict[str, Any]:
    """The keys of a run on ``data.jsonl``."""
    given = {"train": {"path": "data.jsonl"}, "batch_size": 2, **arguments}
    return {"data": {"class_path": "InstructionData", "init_args": given}, "checkpoint.monitor": None}


def columns(table: dict[str, list[Any]]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(
            b"".join(
                json.dumps(dict(zip(table, row, strict=True))).encode() + b"\n"
                for row in zip(*table.values(), strict=True)
            )
        )

    return make


CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"data\.jsonl: the file holds no records"),
    "blank": (b"\n\n  \n", r"data\.jsonl: the file holds no records"),
    "binary": (bytes(range(256)) * 4, r"data\.jsonl, line 1: "),
    "compressed": (b"\x1f\x8b" + bytes(50), r"data\.jsonl, line 1: the file is compressed\. Give it the ending \.gz"),
    "UTF-16": ((LINE * 3).decode().encode("utf-16"), r"data\.jsonl, line 1: .*UTF-8"),
    "Latin-1": (LINE + '{"instruction": "Größe"}'.encode("latin-1"), r"data\.jsonl, line 2: not UTF-8 text"),
    "truncated": (LINE * 3 + LINE[:20], r"data\.jsonl, line 4: not valid JSON"),
    "a list": (LINE + b"[1, 2]\n", r"data\.jsonl, line 2: a record must be a JSON object"),
    "another type below": (
        LINE + b'{"instruction": 3, "output": "x"}\n',
        r"line 2: `instruction` is a number, but text in",
    ),
    "no instruction": (
        b'{"question": "x", "output": "y"}\n' * 4,
        r"data\.init_args\.fields: the train records .* none of the known shapes.* columns are question, output.*'output': 'y'",
    ),
    "no output": (
        b'{"instruction": "x"}\n' * 4,
        r"data\.init_args\.fields: .* none of the known shapes.*'instruction': 'x'",
    ),
    "a missing value": (LINE + b'{"instruction": "x"}\n', r"line 2: the field `output` is missing"),
    "an empty response": (LINE + b'{"instruction": "x", "output": " "}\n', r"line 2: the response is empty"),
    "a field that is a list": (
        b'{"instruction": ["x"], "output": "y"}\n' * 4,
        r"line 1: the field `instruction` is list",
    ),
    "everything too long": (
        json.dumps({"instruction": "a " * 900, "output": "b"}).encode() + b"\n",
        r"raise the limit|max_prompt_length",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTENTS)
def test_a_broken_file_is_named_with_the_line(refusal, tmp_path, kind: str) -> None:
    content, words = CONTENTS[kind]
    (tmp_path / "data.jsonl").write_bytes(content)
    message = refusal(instructions())
    assert re.search(words, message, re.DOTALL), message


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a file that is not there": (
        {"train": {"path": "nowhere.jsonl"}},
        r"data\.init_args\.train\.path: there is no file 'nowhere\.jsonl'",
    ),
    "a glob of nothing": ({"train": {"path": "*.json"}}, r"data\.init_args\.train\.path: no file matches"),
    "a folder": ({"train": {"path": "./"}}, r"data\.init_args\.train\.path: .* is a folder"),
    "another kind of file": ({"train": {"path": "wrong.yaml"}}, r"data\.init_args\.train\.path: .*is none of \.jsonl"),
    "an empty list": ({"train": {"path": []}}, r"data\.init_args\.train\.path: the list is empty"),
    "no Parquet": ({"train": {"path": "data.parquet"}}, r"data\.parquet: not readable as Parquet"),
    "a revision of a file": (
        {"train": {"path": "data.jsonl", "revision": "main"}},
        r"data\.init_args\.train\.revision",
    ),
    "no training records": ({"train": None}, r"data\.init_args\.train"),
    "a column that is not there": (
        {"fields": {"output": "answer"}},
        r"data\.init_args\.fields\.output: there is no column 'answer'",
    ),
    "a field that is none": (
        {"fields": {"question": "instruction"}},
        r"data\.init_args\.fields: 'question' is not a field",
    ),
    "a template of another field": ({"template": "Q: {question}"}, r"data\.init_args\.template: .*'question'"),
    "a template without fields": ({"template": "Question"}, r"data\.init_args\.template: 'Question' is neither"),
    "a template with a stray brace": ({"template": "{instruction} }"}, r"data\.init_args\.template: .*\{\{"),
    "a template as YAML": ({"template": {"Q": "x"}}, r"data\.init_args\.template|template"),
    "a validation twice": (
        {"validation": {"path": "data.jsonl"}, "validation_size": 2},
        r"data\.init_args\.validation_size: 2 was given, and validation too",
    ),
    "a validation of everything": ({"validation_size": 4}, r"data\.init_args\.validation_size"),
    "an unknown way with long items": ({"overlong": "split"}, r"overlong"),
    "a corpus that is not there": (
        {"corpus": {"class_path": "Corpus", "init_args": {"path": "nowhere.txt"}}},
        r"data\.init_args\.corpus\.path",
    ),
    "a tokenizer that is not there": ({"tokenizer": "./nowhere"}, r"data\.init_args\.tokenizer"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_of_the_data_are_named(refusal, tmp_path, kind: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(LINE * 4)
    (tmp_path / "data.parquet").write_bytes(b"PAR1 but no more")
    arguments, words = WRONG[kind]
    message = refusal(instructions(**arguments))
    assert re.search(words, message, re.DOTALL), message


class Strict(Checker):
    """Reads no reference."""

    def __call__(self, response: str, references: Any) -> float:
        return 1.0

    def check(self, references: Any) -> None:
        raise ValueError("needs an x")


class Picky(Reward):
    """Scores no item."""

    def __call__(self, answers: Any) -> list[float]:
        return [0.0 for _ in answers]

    def check(self, item: str, references: Any) -> None:
        raise ValueError(f"cannot score {item}.")


class Watcher(Callback):
    """Has a checker, and nothing else of the project's callbacks."""

    checker = Strict()


OWN = "bad_input.test_wrong_files"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"generation.checker": f"{OWN}.Strict"}, "generation.checker: Strict: needs an x. This is the item 'x1'"),
        (mixed(rewards={"p": f"{OWN}.Picky"}), "model.source.init_args.rewards.p: Picky: cannot score x1."),
        ({"trainer.callbacks": [f"{OWN}.Watcher"]}, "models were loaded"),
    ],
)
def test_checks_of_the_users_own_have_their_key(refusal, tmp_path, keys, words) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"id": "x1", "instruction": "Say it.", "output": "7"}\n' * 40)
    if words == "models were loaded":
        with pytest.raises(AssertionError, match=words):
            refusal({**instructions(validation_size=4, batch_size=8), **keys})
    else:
        assert words in refusal({**instructions(validation_size=4, batch_size=8), **keys})


REWARDED = mixed(rewards={"right": {"class_path": "CheckerReward", "init_args": {"checker": "NumberMatch"}}})


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"generation.checker": "NumberMatch"}, "generation.checker"),
        ({"on_policy": {"max_prompts": 2, "checker": "NumberMatch"}}, "on_policy.checker"),
        (REWARDED, "model.source.init_args.rewards.right.init_args.checker"),
    ],
)
def test_a_reference_that_a_checker_cannot_read_is_found_before_anything_loads(refusal, tmp_path, keys, key) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"id": "x1", "instruction": "Say it.", "output": "no idea"}\n' * 40)
    message = refusal({**instructions(validation_size=4, batch_size=8), **keys})
    assert re.search(rf"{re.escape(key)}: NumberMatch: the reference 'no idea' has no number .* the item 'x1'", message)


COMMANDS: dict[str, tuple[list[str], str]] = {
    "no command": ([], r"fit.*validate.*test.*predict"),
    "another command": (["fti", "--config", "good.yaml"], r"fti"),
    "a config that is not there": (["fit", "--config", "nowhere.yaml"], r"nowhere\.yaml"),
    "a folder as config": (["fit", "--config", "."], r"config"),
    "broken YAML": (["fit", "--config", "broken.yaml"], r"broken\.yaml"),
    "a binary config": (["fit", "--config", "binary.yaml"], r"binary\.yaml"),
    "an empty config": (["fit", "--config", "empty.yaml"], r"empty\.yaml contains nothing"),
    "a config that is a list": (["fit", "--config", "list.yaml"], r"list\.yaml"),
    "a key twice": (["fit", "--config", "twice.yaml"], r"model|twice"),
    "a key without a value": (["fit", "--trainer.max_steps"], r"trainer\.max_steps"),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_wrong_command_line_is_one_message(refusal, tmp_path, capsys, kind: str) -> None:
    (tmp_path / "broken.yaml").write_text("model: {student: [\n")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "list.yaml").write_text("- model\n- data\n")
    (tmp_path / "twice.yaml").write_text("model: {}\nmodel: {objectives: {}}\n")
    arguments, words = COMMANDS[kind]
    message = refused(arguments, capsys)
    assert re.search(words, message, re.DOTALL), message


@pytest.mark.parametrize(
    "words", [["--data.template", "Q: {question}\nA:"], ["--data.init_args.template=Q: {question}\nA:"]]
)
def test_a_template_on_the_command_line_is_a_text_and_no_mapping(refusal, tmp_path, words) -> None:
    (tmp_path / "data.jsonl").write_bytes(LINE * 4)
    message = refusal(instructions(), *words)
    assert r"data.init_args.template: 'Q: {question}\nA:' needs the field 'question'" in message, message
