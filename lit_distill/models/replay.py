"""Replays of work on a GPU: a CUDA graph starts all kernels of a function at once, without Python and without a launch for each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch

Work = Callable[[], None]
"""Reads and writes tensors that keep their size and address; no result."""
Capture = Callable[[Work], Work]
"""Records work without doing it; returns a function that does it again and again, on the values of the moment."""


class Replays:
    """Does each piece of work as it is the first time, and replays it from the second time on.

    Args:
        capture: makes work replayable.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Work | None] = {}

    def run(self, key: Hashable, work: Work) -> None:
        """Do ``work``, or replay the work that was given before with an equal ``key``."""
        if key not in self._replays:
            self._replays[key] = None
            work()  # loads kernels and makes buffers of libraries, which is not allowed in a capture
            return
        replay = self._replays[key]
        if replay is None:
            replay = self._replays[key] = self._capture(work)
        replay()


class CudaCapture:
    """Captures work as CUDA graphs that share their temporary memory. They are replayed on one stream, and end together.

    PyTorch gives the memory of earlier graphs back only outside of a capture, and only if it is told to, or runs out of memory
    (https://github.com/pytorch/pytorch/issues/159594). So the first capture does that.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        # A pool whose graphs have all gone takes no new one, and a graph that goes may take a workspace of the others along
        # (https://github.com/pytorch/pytorch/issues/193402).
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, work: Work) -> Work:
        """See `Capture`.

        Raises:
            RuntimeError: of CUDA, if the work waits for the device or otherwise cannot be captured.
        """
        if not self._graphs:
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        current, own = torch.cuda.current_stream(self.device), _capture_stream(self.device)
        own.wait_stream(current)
        with torch.cuda.stream(own), _without_collection():
            # other threads go on: that of the data loader pins memory, which a stricter mode forbids in the whole process
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # it fails too; the first error is the cause
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(own)
        return graph.replay


@contextmanager
def _without_collection() -> Iterator[None]:
    """Without Python's garbage collection: the end of an older graph would break a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures of a device, since cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)
