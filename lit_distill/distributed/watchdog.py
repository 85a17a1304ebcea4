"""Ends all processes of a run together: other ranks exit when rank 0 dies, and collectives finish before exit."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from functools import cache

RANK_ZERO = "LIT_DISTILL_RANK_ZERO"
"""Environment variable with the process id of rank 0, set for the ranks that it starts."""


def exit_with_rank_zero(every: float = 1.0) -> None:
    """End this process soon after rank 0 has ended, if rank 0 started it.

    Lightning monitors the ranks only from rank 0. If rank 0 is killed, the others would wait for it until the timeout of
    torch.distributed, half an hour by default, and occupy their devices.

    Args:
        every: seconds between two checks.
    """
    rank_zero = os.environ.get(RANK_ZERO)
    if rank_zero is None or os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[RANK_ZERO] = str(os.getpid())
        return

    def watch() -> None:
        while os.getppid() == int(rank_zero):
            time.sleep(every)
        print(f"Rank {os.environ['LOCAL_RANK']} exits because rank 0 has ended.", file=sys.stderr, flush=True)
        os.kill(
            os.getpid(), signal.SIGKILL
        )  # the process may be blocked in a collective that no other signal interrupts

    threading.Thread(target=watch, name="watch-rank-zero", daemon=True).start()


@cache
def drain_at_exit(seconds: float = 0.2) -> None:
    """Register a short wait at interpreter exit, for processes that used collectives.

    A thread of gloo frees the tensors of the last collective after the collective has returned. If the interpreter is already
    exiting, this thread aborts the process. Lightning then kills rank 0 because another rank failed, possibly during its export.
    """
    atexit.register(time.sleep, seconds)
