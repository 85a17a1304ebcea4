"""What the READMEs tell their readers to type is understood; that README.md's commands also run is the first step of CI."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from command_line import run

import lit_distill.callbacks
from lit_distill.objectives import SIGNALS

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "configs", "callbacks", "lit_distill", "tests", "tools", "tools/studies")
READMES = {folder: (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in FOLDERS}
OURS = re.compile(r"(?:lit-distill|-m lit_distill)\s+(?P<subcommand>fit|test|validate|predict)\s+(?P<words>.*)")
OF_SUBCOMMANDS = "--ckpt_path"


def blocks(language: str) -> list[str]:
    """The code blocks of a language, without line continuations."""
    text = "\n".join(READMES.values())
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def commands() -> list[list[str]]:
    """The arguments after the subcommand of every `lit-distill` in them."""
    lines = [line for block in blocks("bash") for line in re.split(r"\n|&&", block)]
    return [shlex.split(found["words"], comments=True) for line in lines if (found := OURS.search(line))]


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """A folder with what a checkout has, and README's own example as kd.yaml."""
    for name in ("configs", "lit_distill", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (example,) = (block for block in blocks("yaml") if block.startswith("# kd.yaml"))
    (tmp_path / "kd.yaml").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-distill"])
    return tmp_path


def test_every_command_of_readme_is_understood(shipped) -> None:
    shown = commands()
    assert len(shown) > 8
    parser = run("--config", "configs/quickstart.yaml", run=False).parser
    for words in shown:
        at = words.index(OF_SUBCOMMANDS) if OF_SUBCOMMANDS in words else len(words)
        parser.parse_args([*words[:at], *words[at + 2 :]])


def test_every_file_that_readme_links_or_runs_is_there() -> None:
    for folder, text in READMES.items():
        linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        run_by = re.findall(r"(?:python|--config|-c) ((?:tools|configs)/\S+\.\w+)", text)
        assert not [path for path in linked if not (ROOT / folder / path).is_file()], folder
        assert not [path for path in run_by if not (ROOT / path).is_file()], folder
    assert len(re.findall(r"\]\((?!http)", READMES["configs"])) > 20
    assert len(READMES["."].splitlines()) <= 150


def test_every_signal_and_every_callback_is_in_its_table() -> None:
    assert not [name for name in SIGNALS if f"`{name}`" not in READMES["lit_distill"]]
    assert not [name for name in lit_distill.callbacks.__all__ if f"`{name}`" not in READMES["callbacks"]]


def test_the_constraints_hold_every_dependency_and_the_lower_bounds_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    bounds = dict(re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line).groups() for line in needed)
    tested, lowest = (
        {
            normal(name): version
            for name, version in re.findall(
                r"^([\w.-]+)==(\S+)$", (ROOT / "tools" / "constraints" / f"{name}.txt").read_text(), re.MULTILINE
            )
        }
        for name in ("tested", "lowest")
    )
    assert not {normal(name) for name in bounds} - tested.keys()
    for name, version in lowest.items():
        if name != "torch":  # see its comment
            assert release(version) == release(bounds[name]), name


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def release(version: str) -> list[int]:
    """``2.6`` and ``2.6.0`` are one."""
    numbers = [int(number) for number in version.split(".")]
    while numbers[-1] == 0:
        numbers.pop()
    return numbers


def test_readme_shows_yaml_that_is_yaml() -> None:
    assert all(yaml.safe_load(block) is not None for block in blocks("yaml"))
