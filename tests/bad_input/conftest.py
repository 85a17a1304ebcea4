"""The command line with something wrong: it ends before anything is learnt, with one message and without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import main, tiny_config, write

REMOVED = "<removed>"
Refusal = Callable[..., str]
MIXED = {"class_path": "TeacherMixedRollouts", "init_args": {"max_new_tokens": 4, "mini_batch_size": 4}}
"""A source that is right, to be spoilt."""


def mixed(**wrong: Any) -> dict[str, Any]:
    """The keys of a run with rollouts, some of them wrong."""
    source = {**MIXED, "init_args": {**MIXED["init_args"], **wrong}}
    return {"model.source": source, "model.objectives": {"long": "PolicyGradient", "single": "ReverseKL"}}


def changed(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the value of every key that ``changes`` names; `REMOVED` removes it."""
    for key, value in changes.items():
        node = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        if value == REMOVED:
            node.pop(last, None)
        else:
            node[last] = value
    return config


@pytest.fixture
def refusal(pair, tmp_path, monkeypatch, capsys) -> Refusal:
    """`lit-distill` with some keys changed, as a function that returns the one message of which it dies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def begins(*arguments: object) -> None:
        raise AssertionError("training began")

    def loads(*arguments: object) -> None:
        raise AssertionError("models were loaded")

    def refuse(changes: Mapping[str, Any], *arguments: str, command: str = "fit", loading: bool = False) -> str:
        monkeypatch.setattr("lit_distill.module.DistillationModule.training_step", begins)
        if not loading:
            monkeypatch.setattr("lit_distill.module.load_models", loads)
        config = write(changed(tiny_config(pair), changes), tmp_path / "wrong.yaml")
        return refused([command, "--config", str(config), *arguments], capsys)

    return refuse


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `lit-distill` says when it does not do as it is told."""
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    said = capsys.readouterr().err
    code = stop.value.code
    assert code not in (0, None)
    assert "Traceback" not in said
    message = code if isinstance(code, str) else said  # the interpreter prints a message, and then the status is 1
    assert message.startswith("error: "), message
    assert len(message.splitlines()) <= 12, message
    return message


def damaged(folder: Path, into: Path) -> Path:
    """A copy of a model's folder, to be damaged."""
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    return into
