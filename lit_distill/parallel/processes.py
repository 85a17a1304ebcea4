"""Processes that run together and must end together, without a word lost."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from functools import cache

RANK_ZERO = "LIT_DISTILL_RANK_ZERO"
"""Variable of the environment that tells the ranks which rank 0 starts who that is."""


def follow_rank_zero(every: float = 1.0) -> None:
    """End this process, if rank 0 started it, soon after rank 0 has ended in whatever way.

    Lightning looks after the ranks from rank 0 alone. Where that is killed, the others would wait for it as long as
    torch.distributed does, half an hour by default, and hold their devices.

    Args:
        every: seconds between two looks.
    """
    rank_zero = os.environ.get(RANK_ZERO)
    if rank_zero is None or os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[RANK_ZERO] = str(os.getpid())
        return

    def follow() -> None:
        while os.getppid() == int(rank_zero):
            time.sleep(every)
        print(f"Rank {os.environ['LOCAL_RANK']} ends, since rank 0 has.", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)  # it may wait for rank 0 in code that hears nothing else

    threading.Thread(target=follow, name="follow-rank-zero", daemon=True).start()


@cache
def settle_at_exit(seconds: float = 0.2) -> None:
    """Wait a little when the interpreter ends, once it has talked to other ranks.

    A thread of gloo gives back the tensors of the last collective when the ranks have gone on already. If the interpreter is
    ending by then, the thread aborts the process; and Lightning kills rank 0, at its export perhaps, if another rank ended badly.
    """
    atexit.register(time.sleep, seconds)
