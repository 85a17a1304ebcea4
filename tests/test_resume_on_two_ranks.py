"""A run on two ranks of which one is killed ends soon, and goes on from `last` to the same bits."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from command_line import write
from processes import run_on_ranks
from test_resume import KILLER, config_of, logged

from lit_distill.distributed import AtomicCheckpointIO, read_checkpoint
from lit_distill.distributed.checkpoint import save_sharded

SPEC = importlib.util.spec_from_file_location("kill_study", Path(__file__).parents[1] / "tools" / "kill_study.py")
kill_study = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kill_study)
SECONDS = 15.0
"""After which nothing is left of a run of which a rank was killed: Lightning looks every 5 s, and so do workers of data loaders."""
LEFT_ALONE = """
import os, subprocess, sys, time
from lit_distill.distributed.watchdog import exit_with_rank_zero

exit_with_rank_zero(0.1)
if "LOCAL_RANK" in os.environ:
    import torch.distributed as dist

    print("here", flush=True)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[1], rank=1, world_size=2)
else:
    subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": "1"})
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for key in [key for key in os.environ if key.startswith(("PL_", "LIT_DISTILL"))]:  # of runs in this process
        monkeypatch.delenv(key)


FIT = """
import sys
from lit_distill.cli import main

main(["fit", *sys.argv[1:]])
"""


def job_of(*arguments: object) -> kill_study.Job:
    """Two ranks in a session of their own, which write to ``output.txt``."""
    with Path("output.txt").open("wb") as output:
        return kill_study.Job([sys.executable, *map(str, arguments)], output)


def finished(*arguments: object) -> None:
    """A run of two ranks from its start to its end, without a launcher."""
    Path("fit.py").write_text(FIT)
    run_on_ranks(Path("fit.py").resolve(), 2, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "method", "workers", "killed", "saved"),
    [("ddp", "offline", 2, 1, 6), ("fsdp2", "minillm", 0, 0, 4)],  # four steps of MiniLLM are two batches
)
def test_two_ranks_of_which_one_is_killed_end_and_go_on_to_the_same_bits(
    pair, tmp_path, strategy: str, method: str, workers: int, killed: int, saved: int
) -> None:
    config = config_of(pair, method, workers)
    config["trainer"] |= {"devices": 2, "strategy": strategy, "max_steps": 10}
    finished("--config", write(config, tmp_path / "whole.yaml"))
    (tmp_path / "killer.py").write_text(KILLER.format(step=7, ranks=[killed]))
    job = job_of("killer.py", write(config, tmp_path / "killed.yaml"))
    try:
        job.leader.wait(120)
        seconds = job.ended(SECONDS)
    finally:
        job.kill("all")
    assert seconds is not None, "a process of the run lives on"
    assert job.leader.returncode not in (0, None), Path("output.txt").read_text()[-3000:]
    checkpoints = Path("runs/killed/version_0/checkpoints")
    assert read_checkpoint(checkpoints / "last.ckpt")["global_step"] == saved
    finished("--config", "killed.yaml", "--ckpt_path", "last")
    ends = [kill_study.left(name, Path("runs")) for name in ("killed", "whole")]
    assert kill_study.same(*ends)
    assert logged("runs/killed/version_0") == logged("runs/whole/version_0")
    assert Path("runs/killed/version_0/export/best/model.safetensors").exists()


@pytest.mark.slow
def test_a_rank_that_waits_for_a_rank_0_that_was_killed_ends(tmp_path) -> None:
    (tmp_path / "alone.py").write_text(LEFT_ALONE)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and listens to nothing
        job = job_of("alone.py", nobody.getsockname()[1])
        try:
            end = time.monotonic() + 60
            while "here" not in Path("output.txt").read_text() and time.monotonic() < end:
                time.sleep(0.1)
            assert len(job.living()) == 2, Path("output.txt").read_text()[-3000:]
            job.kill("rank 0")
            assert job.ended(SECONDS) is not None, "rank 1 lives on"
        finally:
            job.kill("all")
    assert "Rank 1 exits because rank 0 has ended" in Path("output.txt").read_text()


def test_a_folder_that_is_deleted_is_whole_or_not_there(tmp_path) -> None:
    path = tmp_path / "step-2.ckpt"
    save_sharded({"step": 2}, path, 0, lambda: None)
    with patch("fsspec.implementations.local.LocalFileSystem.rm", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            AtomicCheckpointIO().remove_checkpoint(path)
        assert not path.exists()
    save_sharded({"step": 3}, path, 0, lambda: None)
    assert read_checkpoint(path)["step"] == 3
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not list(tmp_path.iterdir())
