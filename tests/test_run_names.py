"""A run has the checkpoints below its own name, and lies below the folder of all runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from command_line import main, tiny_config, write

from lit_distill.cli.app import run_name
from lit_distill.cli.runs import last_checkpoint


@pytest.mark.parametrize("name", ["lab[2]", "kd*2", "a {b} ?"])
def test_the_last_checkpoint_of_a_run_is_its_own_whatever_its_name(tmp_path, name: str) -> None:
    for run in (name, "lab2", "kdAAA2", "a {b} x"):
        file = tmp_path / run / "version_0" / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
    assert last_checkpoint(tmp_path, name) == tmp_path / name / "version_0" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", ["../elsewhere", "a/../../b", "/tmp/run"])
def test_a_run_lies_below_the_folder_of_all_runs(name: str) -> None:
    with pytest.raises(ValueError, match=r"^run_name: .* is outside of trainer\.default_root_dir"):
        run_name(SimpleNamespace(run_name=name, config=[]))
    assert run_name(SimpleNamespace(run_name="sweep/one", config=[])) == "sweep/one"


def test_an_abbreviated_key_is_refused_as_it_is_in_yaml(pair, tmp_path, capsys) -> None:
    config = write(tiny_config(pair), tmp_path / "c.yaml")
    with pytest.raises(SystemExit):
        main("fit", "--config", config, "--trainer.max_step", "3")
    said = capsys.readouterr().err
    assert "unrecognized arguments: --trainer.max_step" in said
    assert "Did you mean 'trainer.max_steps'?" in said
