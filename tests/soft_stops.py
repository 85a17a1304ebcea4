"""A tiny run that is stopped in a gentle way and goes on, beside the same run that was never stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_distill.callbacks import RunCheckpoint
from lit_distill.data import GeneratedCorpus, ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import NextToken

BATCHES = 4
"""Of an epoch."""
ITEMS = 4 * BATCHES + 2
"""Of which two wait for another epoch."""


class Journal(Callback):
    """What a run reads, validates and ends, in its order."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int, tuple[str, ...], list[int]]] = []
        self.validated: list[int] = []
        self.ended: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        rows = [] if batch.corpus is None else batch.corpus.input_ids[:, :4].flatten().tolist()
        self.read.append((trainer.current_epoch, batch_idx, batch.ids, rows))

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # else the run was stopped inside the epoch
            self.ended.append((trainer.current_epoch, trainer.global_step))


class StopAt(Callback):
    """Asks for a stop in a hook of batch ``at``, counted over the run from 1."""

    def __init__(self, at: int, hook: str, stop: Callable[[Any], None]) -> None:
        self.at, self.stop, self.count = at, stop, 0
        setattr(self, hook, self._look)

    def _look(self, trainer, *arguments: object) -> None:
        if not trainer.sanity_checking and trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.at:
            self.stop(trainer)


def should_stop(trainer) -> None:
    trainer.should_stop = True


def sigterm(trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Patience(EarlyStopping):
    """Loses patience at batch ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__("train/loss", check_on_train_epoch_end=False)
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, *arguments) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.at:
            self.best_score, self.wait_count = torch.tensor(-torch.inf), self.patience
            self._run_early_stopping_check(trainer)

    def on_validation_end(self, trainer, pl_module) -> None: ...


class Clock(Timer):
    """As ``max_time``; its time is up at batch ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__(duration={"hours": 1}, verbose=False)
        self.at = at

    def on_train_batch_end(self, trainer, *arguments) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.at:
            self._start_time["train"] -= 7200
        super().on_train_batch_end(trainer, *arguments)


STOPS: dict[str, Callable[[int], Callback]] = {
    "should_stop": lambda at: StopAt(at, "on_train_batch_end", should_stop),
    "should_stop in a step": lambda at: StopAt(at, "on_before_optimizer_step", should_stop),
    "should_stop in a validation": lambda at: StopAt(at, "on_validation_end", should_stop),
    "should_stop at the end of an epoch": lambda at: StopAt(at, "on_train_epoch_end", should_stop),
    "should_stop at the start of an epoch": lambda at: StopAt(at, "on_train_epoch_start", should_stop),
    "EarlyStopping": Patience,
    "max_time": Clock,
    "SIGTERM": lambda at: StopAt(at, "on_train_batch_start", sigterm),
    "SIGTERM in a validation": lambda at: StopAt(at, "on_validation_batch_start", sigterm),
}


def learner(pair, source=None, objectives=None, **settings: Any) -> DistillationModule:
    torch.manual_seed(0)
    student, teacher = pair
    adam = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01)}
    corpus = {"corpus_objectives": {"lm": NextToken()}}  # whose rows go on over the epochs
    return DistillationModule(
        ModelSpec(str(student)),
        objectives or {"ce": NextToken()},
        ModelSpec(str(teacher)) if source else None,
        source and source(),
        **{**adam, **corpus, **settings},
    )


def data(corpus_rows: int = 4, **settings: Any) -> ProceduralData:
    corpus = GeneratedCorpus(num_documents=40, length=16, batch_size=corpus_rows)
    sizes = {"num_train": ITEMS, "num_validation": 4, "num_test": 4, "batch_size": 4, "eval_batch_size": 4}
    return ProceduralData(**{**sizes, "corpus": corpus, "seed": 3, **settings})


class Run:
    """A run, and how it ended; without a teacher where the data say everything.

    Args:
        module: to fit.
        folder: of its checkpoints.
        callbacks: beside the journal.
        ckpt_path: to go on from.
        items: the data.
        settings: of the Trainer.
    """

    def __init__(
        self,
        module: DistillationModule,
        folder: Path,
        callbacks: list[Callback] | None = None,
        ckpt_path: Path | None = None,
        items: ProceduralData | None = None,
        checkpoint: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.journal, self.module, self.last = Journal(), module, folder / "last.ckpt"
        options = {"save_last": True, "save_top_k": 0, **(checkpoint or {})}
        self.trainer = L.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            callbacks=[self.journal, *(callbacks or []), RunCheckpoint(folder, filename="{step}", **options)],
            **{
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "limit_val_batches": 0,
                **settings,
            },
        )
        with suppress(SIGTERMException):
            self.trainer.fit(module, items or data(), ckpt_path=ckpt_path, weights_only=True)

    def end(self) -> dict[str, Any]:
        """Everything that has to be equal to the last bit."""
        loop = self.trainer.fit_loop
        return {
            "weights": torch.cat([p.detach().flatten() for p in self.module.student.parameters()]),
            "optimizer": [
                torch.cat([value.flatten().double() for value in state.values()])
                for state in self.trainer.optimizers[0].state.values()
            ],
            "source": self.module.source.state_dict(),
            "epoch": (self.trainer.current_epoch, loop.epoch_progress.total.completed),
            "step": self.trainer.global_step,
            "batches": (loop.epoch_loop.batch_progress.total.ready, loop.epoch_loop._batches_that_stepped),
        }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
