"""A script in one process on each of several ranks, which talk over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path


def run_on_ranks(script: Path, ranks: int, *arguments: object, timeout: float = 300) -> None:
    """Run ``script`` once on each rank and wait for all of them.

    Lightning finds the processes started, and starts none: so one process may hold many Trainers, one after the other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
    with ExitStack() as stack:
        started = []
        outside = {key: value for key, value in os.environ.items() if not key.startswith("PL_")}  # seeds of other tests
        for rank in range(ranks):
            place = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if ranks > 1 else {}
            environment = {**outside, "OMP_NUM_THREADS": "1", **place}
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(command, cwd=script.parent, env=environment, stdout=said, stderr=said)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append((process, said))
        end = time.monotonic() + timeout
        while any(process.poll() is None for process, _ in started) and time.monotonic() < end:
            if any(process.poll() for process, _ in started):
                break  # the others would wait for it
            time.sleep(0.1)
        for process, said in sorted(started, key=lambda pair: pair[0].poll() is None):
            said.seek(0)
            assert process.poll() == 0, said.read()[-4000:] or "no end in sight"
