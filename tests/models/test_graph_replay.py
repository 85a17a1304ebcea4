"""Work is done, captured and replayed in this order; of CUDA, what a capture asks for."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_distill.models import replay
from lit_distill.models.replay import CudaCapture, Replays


def test_work_is_done_once_as_it_is_then_captured_once_and_replayed() -> None:
    done: list[str] = []

    def capture(work):
        done.append("captured")
        return lambda: done.append("replayed")

    replays = Replays(capture)
    for key in ("a", "a", "b", "a", "b"):
        replays.run(key, lambda key=key: done.append(key))
    assert done == ["a", "captured", "replayed", "b", "replayed", "captured", "replayed"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A CUDA that only writes down what is asked of it."""
    asked: list[Any] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            asked.append((self.name, "waits for", other.name))

    class Graph:
        def capture_begin(self, **settings: object) -> None:
            asked.append(("begin", settings, gc.isenabled()))

        def capture_end(self) -> None:
            asked.append("end")
            if "fails" in asked:
                raise RuntimeError("the capture was invalidated")

        def replay(self) -> None:
            asked.append(("replay", self))

    fake = SimpleNamespace(
        graph_pool_handle=lambda: "pool", empty_cache=lambda: asked.append("empty"), CUDAGraph=Graph,
        current_stream=lambda device: Stream("current"), stream=lambda stream: nullcontext(),
    )  # fmt: skip
    monkeypatch.setattr(replay.torch, "cuda", fake)
    monkeypatch.setattr(replay, "_capture_stream", lambda device: Stream("own"))
    return asked


def test_graphs_share_a_pool_and_stay_and_the_first_frees_memory(cuda: list[Any]) -> None:
    capture = CudaCapture(torch.device("cpu"))
    first, second = (capture(lambda name=name: cuda.append(name)) for name in ("one", "two"))
    begin = ("begin", {"pool": "pool", "capture_error_mode": "thread_local"}, False)
    once = [("own", "waits for", "current"), begin]
    after = ["end", ("current", "waits for", "own")]
    assert cuda == ["empty", *once, "one", *after, *once, "two", *after]
    assert gc.isenabled()
    del cuda[:]
    second()
    first()
    assert [graph for _, graph in cuda] == capture._graphs[::-1]


def test_the_error_of_the_work_is_raised_and_the_capture_ends(cuda: list[Any]) -> None:
    def work() -> None:
        cuda.append("fails")
        raise ValueError("reads a value")

    with pytest.raises(ValueError, match="reads a value"):
        CudaCapture(torch.device("cpu"))(work)
    assert cuda[-1] == "end"
    assert gc.isenabled()
