"""The tool that kills runs kills what it says, and sees what is left."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "tools" / "kill_study.py"
SPEC = importlib.util.spec_from_file_location("kill_study", PATH)
kill_study = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kill_study)
RANKS = """
import os, subprocess, sys, time
if "LOCAL_RANK" not in os.environ:
    subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": "1"})
    subprocess.Popen(["sleep", "60"])
time.sleep(60)
"""


def job(folder: Path) -> kill_study.Job:
    """Rank 0 with a rank 1 and a worker, none of which looks after the others."""
    (folder / "ranks.py").write_text(RANKS)
    started = kill_study.Job([sys.executable, str(folder / "ranks.py")], subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not (len(started.living()) == 3 and started.other_ranks()) and time.monotonic() < end:
        time.sleep(0.05)
    return started


@pytest.mark.slow
def test_one_rank_is_killed_and_what_is_left_is_seen_and_ended(tmp_path) -> None:
    for who in ("rank 0", "another rank"):
        started = job(tmp_path)
        others = started.other_ranks()
        assert len(others) == 1
        assert started.kill(who) == who
        gone = started.leader.pid if who == "rank 0" else others[0]
        time.sleep(0.2)
        assert len(started.living()) == 2
        assert gone not in started.living()
        assert started.ended(0.2) is None
        assert started.ended(5.0) is not None


@pytest.mark.slow
def test_a_job_of_which_nothing_is_left_has_ended(tmp_path) -> None:
    started = job(tmp_path)
    assert started.kill("all") == "all"
    assert started.ended(5.0) is not None
    assert started.leader.returncode == -9


def test_states_are_compared_to_the_last_bit() -> None:
    state = {"weights": [torch.ones(2), 3], "step": 4}
    assert kill_study.same(state, {"step": 4, "weights": [torch.ones(2), 3]})
    assert not kill_study.same(state, {"step": 4, "weights": [torch.ones(2) + 1e-7, 3]})
    assert not kill_study.same(state, {"step": 4, "weights": [torch.ones(2)]})
