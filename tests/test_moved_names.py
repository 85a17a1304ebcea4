"""Names that YAML and user code had before still work for one release, and name their successor."""

from __future__ import annotations

import sys

import pytest
from command_line import run, tiny_config, write

import lit_distill
from lit_distill.generation import Prediction
from lit_distill.sources import TeacherMixedRollouts


@pytest.mark.parametrize("name", lit_distill.MOVED)
def test_a_module_is_imported_by_its_old_name(name: str) -> None:
    sys.modules.pop(f"lit_distill.{name}", None)
    with pytest.warns(FutureWarning, match=rf"lit_distill\.{name} is now lit_distill\.{lit_distill.MOVED[name]}\."):
        __import__(f"lit_distill.{name}")
    sys.modules.pop(f"lit_distill.{name}")


def test_a_module_that_never_was_is_not_imported() -> None:
    with pytest.raises(ModuleNotFoundError):
        __import__("lit_distill.players")


def test_a_class_path_of_before_is_the_class(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    objectives = {"long": "PolicyGradient", "single": "ReverseKL"}
    source = {"class_path": "lit_distill.rollouts.TeacherMixedRollouts", "init_args": {"max_new_tokens": 4}}
    sys.modules.pop("lit_distill.rollouts", None)
    config = write(tiny_config(pair, objectives=objectives, source=source), tmp_path / "c.yaml")
    with pytest.warns(FutureWarning, match=r"lit_distill\.rollouts is now lit_distill\.sources"):
        cli = run("--config", config, run=False)
    assert type(cli.model.source) is TeacherMixedRollouts


def test_the_speaker_of_a_prediction_is_its_model() -> None:
    with pytest.warns(FutureWarning, match=r"model\.prediction\.speaker is now model\.prediction\.model"):
        assert Prediction(speaker="teacher").model == "teacher"
