"""A script in a process of its own, or in one on each of several ranks, which talk over gloo."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

from lightning.pytorch.utilities import rank_zero_only

IMPORTED = ["lit_distill.cli.app", "lit_distill.module", "lit_distill.distributed", "peft"]
"""By one process, of which all others here are copies: importing it takes 9 s of processor time, more than most scripts do."""


def run_on_ranks(script: Path, ranks: int, *arguments: object, timeout: float = 300) -> None:
    """Run ``script`` once on each rank and wait for all of them.

    Lightning finds the processes started, and starts none: so one process may hold many Trainers, one after the other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        started = []
        for rank in range(ranks):
            place = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
            started.append(stack.enter_context(_started(script, arguments, place)))
        end = time.monotonic() + timeout
        while any(process.is_alive() for process, _ in started) and time.monotonic() < end:
            if any(process.exitcode for process, _ in started):
                end = min(end, time.monotonic() + 2)  # for the others, which fail because of it, to say so
            time.sleep(0.1)
        said = [
            f"rank {rank}: status {process.exitcode}\n{output.read_text()[-4000:]}"
            for rank, (process, output) in enumerate(started)
        ]
        assert all(process.exitcode == 0 for process, _ in started), "\n".join(said)


def exit_status(script: Path, *arguments: object, timeout: float = 300) -> tuple[int | None, str]:
    """Run ``script`` to its end; its status, negative where a signal ended it, and what it printed."""
    with _started(script, arguments, {}) as (process, output):
        process.join(timeout)
        return process.exitcode, output.read_text()


@contextmanager
def _started(
    script: Path, arguments: tuple[object, ...], more: Mapping[str, str]
) -> Iterator[tuple[BaseProcess, Path]]:
    """The process of a script, which is killed at the end, and the file that it prints to."""
    context = multiprocessing.get_context("forkserver")
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        context.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PL_")}  # seeds of other tests
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        output.touch()
        words = [str(script), *map(str, arguments)]
        process = context.Process(target=_be, args=(words, {**outside, **more, "OMP_NUM_THREADS": "1"}, output))
        process.start()
        try:
            yield process, output
        finally:
            process.kill()
            process.join()


def _be(words: list[str], environment: dict[str, str], output: Path) -> None:
    """Do what an interpreter does that is started with these words in the folder of the script."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(Path(words[0]).parent)
    warnings.simplefilter("ignore")
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))  # which Lightning asks for when it is imported
    multiprocessing.set_start_method(None, force=True)  # workers of data loaders start as they do outside of tests
    sys.argv[:] = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
