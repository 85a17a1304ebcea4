"""Memory of this process, sampled in a thread; imports nothing heavy, so that a process can be measured from its beginning."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

STATUS = Path("/proc/self/status")


def used_memory() -> float:
    """Bytes of this process without the pages of mapped files, which the system takes back when it needs room; NaN if unknown."""
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("RssAnon"):
                return 1024.0 * int(line.split()[1])
    return float("nan")


class MemorySampler:
    """Samples `used_memory` inside its context. A shorter peak is missed, and the thread takes some time from the work.

    Args:
        every: seconds between two samples.
    """

    def __init__(self, every: float = 0.002) -> None:
        self.every = every
        self.before = float("nan")
        """Bytes when the context began."""
        self.most = float("nan")
        """Bytes at most."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.before = self.most = used_memory()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            self.most = max(self.most, used_memory())
