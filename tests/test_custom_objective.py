"""The objective that the README shows works from a file of the user's own, by its import path."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from command_line import main, tiny_config, write

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    """The first block of Python in the README that defines an objective."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if re.search(r"class \w+\(Objective\)", block))


def test_the_readmes_objective_trains(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # As in a console script: the folder one works in is not on the path before `main` puts it there.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    (tmp_path / "objective_of_mine.py").write_text(example(), encoding="utf-8")
    (name,) = re.findall(r"class (\w+)\(Objective\)", example())
    config = tiny_config(pair, objectives={"own": {"class_path": f"objective_of_mine.{name}"}})
    main("fit", "--config", write(config, tmp_path / "own.yaml"), "--export.enabled", "false")
    (log,) = (tmp_path / "runs").rglob("metrics.csv")
    assert "train/own" in log.read_text().splitlines()[0]
    monkeypatch.delitem(sys.modules, "objective_of_mine")
    assert len(example().splitlines()) <= 30
