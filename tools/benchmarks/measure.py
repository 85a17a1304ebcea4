"""Alternating timing, ratios, peak memory, and counters of the work that is done."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
from gpu_checks.machine import Machine
from torch import Tensor, nn

from benchmarks.memory import MemorySampler
from lit_distill.models import CausalLM, LMHead

MB = 2**20


@dataclass(frozen=True)
class Bench:
    """What every row gets: the device, how often it measures, and which sizes it uses."""

    machine: Machine
    repeats: int = 3
    quick: bool = False
    """Tiny sizes, to try whether everything runs; no goals are judged."""
    plots: Path | None = None
    """Folder of the plots."""

    def size(self, quick: Any, cpu: Any, cuda: Any) -> Any:
        """The size for this run."""
        if self.quick:
            return quick
        return cuda if self.machine.cuda else cpu

    @property
    def precision(self) -> str:
        """Precision of the training steps."""
        return "bf16-mixed" if self.machine.cuda and not self.quick else "32-true"

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Dtype of the teacher's weights."""
        return torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32

    def clock(self, work: Callable[[], object]) -> Callable[[], float]:
        """``work`` as a function that returns its seconds, with everything that it has queued on the device."""

        def timed() -> float:
            self.machine.wait()
            since = time.perf_counter()
            work()
            self.machine.wait()
            return time.perf_counter() - since

        return timed


def alternate(ways: Mapping[str, Callable[[], float]], repeats: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Run all ways in turn, ``repeats`` times, so that a machine that changes its speed changes that of all.

    Args:
        ways: by name; each does its work once and returns the seconds that it took.
        repeats: number of rounds in the result.
        warm_up: first run each way once more, and forget the result.

    Returns:
        The seconds of each way by name; entry i of all of them is from round i.
    """
    if warm_up:
        for way in ways.values():
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(way())
    return seconds


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of two ways in the same round."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def return_memory(machine: Machine) -> None:
    """Give memory that is not used back to the system or the device, so that it does not hide what is used next."""
    gc.collect()
    if machine.cuda:
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library has no such function
            ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Measures the extra memory that is used inside its context, on a processor with `MemorySampler`; so time nothing inside."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.extra = float("nan")
        """Bytes at most, against those before; NaN if the system does not say."""
        self._before = 0
        self._sampler = MemorySampler()

    def __enter__(self) -> Self:
        return_memory(self.machine)
        self.machine.wait()
        if self.machine.cuda:
            torch.cuda.reset_peak_memory_stats(self.machine.device)
            self._before = torch.cuda.memory_allocated(self.machine.device)
        else:
            self._sampler.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.wait()
        if self.machine.cuda:
            self.extra = float(torch.cuda.max_memory_allocated(self.machine.device) - self._before)
        else:
            self._sampler.__exit__()
            self.extra = self._sampler.most - self._sampler.before


@dataclass
class Work:
    """Forward passes of a body, the token slots in them (padding included), and the rows that its LM head projects."""

    forwards: int = 0
    tokens: int = 0
    rows: int = 0

    def __str__(self) -> str:
        return f"{self.forwards:,} forwards, {self.tokens:,} tokens, {self.rows:,} head rows"


@dataclass
class Counts:
    """The work of each model, by its name."""

    models: dict[str, Work] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(f"{name} {work}" for name, work in self.models.items())


@contextmanager
def counted(models: Mapping[str, CausalLM]) -> Iterator[Counts]:
    """Count the work of models inside the context, whoever runs them.

    A head counts if the project or the model itself applies it; a kernel that takes the weight is not seen.
    """
    counts = Counts({name: Work() for name in models})
    heads = {lm.model.get_output_embeddings().weight.data_ptr(): counts.models[name] for name, lm in models.items()}
    widths = {lm.config.hidden_size: counts.models[name] for name, lm in models.items()}
    project = LMHead.project

    def own(head: LMHead, hidden: Tensor) -> Tensor:
        # a cast of the weight lies elsewhere
        heads.get(head.weight.data_ptr(), widths[head.weight.shape[1]]).rows += len(hidden)
        return project(head, hidden)

    with ExitStack() as stack:
        stack.enter_context(patch.object(LMHead, "project", own))
        for name, lm in models.items():
            work = counts.models[name]
            stack.callback(setattr, lm, "cuda_graphs", lm.cuda_graphs)
            lm.cuda_graphs = False  # a replay runs no Python, so it would not be seen
            handles = [
                lm.model.base_model.register_forward_pre_hook(_count_tokens(work), with_kwargs=True),
                lm.model.get_output_embeddings().register_forward_pre_hook(_count_rows(work)),
            ]
            for handle in handles:
                stack.callback(handle.remove)
        yield counts


def warm_up(models: Mapping[str, CausalLM], ways: Mapping[str, Callable[[], object]]) -> str:
    """Run each way once, and tell the work of each."""
    notes = []
    for name, way in ways.items():
        with counted(models) as counts:
            way()
        notes.append(f"{name}: {counts}")
    return ". ".join(notes)


def _count_tokens(work: Work) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        work.forwards += 1
        work.tokens += 0 if ids is None else ids.numel()

    return hook


def _count_rows(work: Work) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        work.rows += arguments[0].shape[:-1].numel()

    return hook
