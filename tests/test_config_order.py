"""What a config needs from another run is made by a command that stands before its own, in its head and in the README."""

from __future__ import annotations

import re
import shlex
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FETCH, BUILD = "tools/fetch_smollm2.py", "tools/build_second_teacher.py"


def head(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("#") for line in takewhile(lambda line: line.startswith("#"), lines))


def commands(text: str) -> list[list[str]]:
    """The words of every command of the project in a shell's text, without comments."""
    lines = [line.strip() for line in re.sub(r"\\\n", "", text).splitlines()]
    found = [re.search(r"(lit-distill \w+ --config|python tools/(fetch|build)_\w+\.py).*", line) for line in lines]
    return [shlex.split(match[0], comments=True) for match in found if match]


def values(node: Any) -> list[str]:
    if isinstance(node, dict | list):
        return [text for child in (node.values() if isinstance(node, dict) else node) for text in values(child)]
    return [node] if isinstance(node, str) else []


def needs(path: Path) -> set[str]:
    """Runs, files of predictions and fetched models that a config reads."""
    texts = values(yaml.safe_load(path.read_text(encoding="utf-8")))
    made = {made_by(text) for text in texts if text.startswith("runs/") or text.endswith(".jsonl")}
    return made | ({FETCH} if any(text.startswith("~/.cache/lit_distill") for text in texts) else set())


def made_by(path: str) -> str:
    """The run or the file that a path below ``runs`` is of."""
    return path.split("/")[1] if path.startswith("runs/") else path


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def makes(words: list[str]) -> set[str]:
    """What there is after a command."""
    if FETCH in words:
        return {FETCH}
    if BUILD in words:
        return {made_by(words[-1])}
    config = option(words, "--config") or ""
    prediction = option(words, "--model.prediction.path")
    return {option(words, "--run_name") or Path(config).stem, *([made_by(prediction)] if prediction else [])}


def missing(shown: list[list[str]], there: set[str] = frozenset()) -> list[str]:
    """What commands need that neither is ``there`` nor was made by those before."""
    lacking, there = [], set(there)
    for words in shown:
        config = option(words, "--config")
        written = words[-1] if BUILD in words else option(words, "--model.prediction.path")
        given = {made_by(value) for value in words if value.startswith("runs/") and value != written}
        replaced = "--model.student.path" in words  # its own student takes the place of the config's
        if config is not None and not replaced:
            lacking += [f"{config} needs {need}" for need in sorted(needs(ROOT / config) - there)]
        lacking += [f"{' '.join(words)} needs {need}" for need in sorted(given - there)]
        there |= makes(words)
    return lacking


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_head_of_a_config_says_what_to_run_before_it(config: Path) -> None:
    referred = re.findall(r"([\w.]+\.yaml), whose head says what to run first", head(config))
    referred += re.findall(r"the teacher is that of\s+([\w.]+\.yaml)", head(config))
    text = "\n".join([*(head(config.with_name(name)) for name in referred), head(config)])
    assert not missing(commands(text))


def test_the_commands_of_the_readme_make_what_they_need_in_their_order() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "configs/README.md")]
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(texts), re.DOTALL)
    shown = [commands(block) for block in blocks]
    own = [
        [words for words in block if (option(words, "--config") or "configs/").startswith("configs/")]
        for block in shown
    ]
    assert sum(map(len, own)) > 6
    assert not [lack for block in own for lack in missing(block)]
