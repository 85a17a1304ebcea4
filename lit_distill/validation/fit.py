"""Checks a run before any weights load: Trainer, data, source, objectives and optimiser together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.types import arguments_of
from lit_distill.validation.callbacks import check_callbacks
from lit_distill.validation.monitors import check_monitors
from lit_distill.validation.optimizer import check_optimizer
from lit_distill.validation.precision import check_plugins, check_precision
from lit_distill.validation.run_length import RunLength, has_validation, run_length

if TYPE_CHECKING:
    from lit_distill.validation.run import DistillationRun

REFUSED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


LARGE_BATCH = 1_000_000
"""A number of texts of which no source makes one optimiser step, if it makes several of any batch."""


def check_strategy(trainer: Any) -> None:
    """Refuse a strategy of the Trainer that cannot train a `DistillationModule`.

    Raises:
        ValueError: if the strategy shards the student in its own way.
    """
    name = type(trainer.strategy).__name__
    if name in REFUSED_STRATEGIES:
        raise ValueError(
            f"trainer.strategy: {name} cannot shard the teacher and does not support the chunked LM head. Use fsdp2, which "
            "shards both models, or ddp if both fit on each device."
        )


def check_trainer(trainer: Any) -> None:
    """Check the options of a Trainer before it fits a `DistillationModule`.

    Raises:
        ValueError: with the key, what was given and what to do.
    """
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches} would average micro-batches of different "
            "lengths. Set data.init_args.batch_size to the items of one optimiser step and model.micro_batch_size to the "
            "texts that fit in memory at once."
        )
    check_precision(trainer.precision)
    check_plugins(trainer)
    check_callbacks(trainer.callbacks)
    if not hasattr(trainer, "val_check_interval"):  # Lightning does not set it if it is a time
        raise ValueError("trainer.val_check_interval: expected a number of batches or a share of an epoch, got a time.")
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"trainer.{name}: 0 would train nothing. Give a larger number, or remove the key.")
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        raise ValueError(
            f"trainer.gradient_clip_val: expected a norm >= 0 (0 is off), got {trainer.gradient_clip_val}. A usual value is 1.0."
        )
    validates = has_validation(trainer)
    for callback in trainer.callbacks:
        if type(callback) is ModelCheckpoint and callback._every_n_train_steps > 0:
            raise ValueError(
                f"trainer.callbacks: ModelCheckpoint compares the step modulo every_n_train_steps "
                f"({callback._every_n_train_steps}), which never fits if a batch has many steps. Set "
                "checkpoint.every_n_train_steps, or class_path: RunCheckpoint, which saves at the end of such a batch."
            )
        if isinstance(callback, ModelCheckpoint) and (callback.monitor or "").startswith("val/") and not validates:
            raise ValueError(
                f"checkpoint.monitor: {callback.monitor} is monitored, but there is no validation. Set "
                "data.init_args.validation or validation_size, or checkpoint.monitor: null."
            )


def check_fit(run: DistillationRun) -> None:
    """Check Trainer, data, source, objectives and optimiser of a run together, before its weights load.

    Raises:
        ValueError: with the key, what was given and what to do.
    """
    trainer: Any = run.trainer
    check_trainer(trainer)
    length = run_length(trainer, run.source)
    lora = run.student_spec.lora
    check_optimizer(
        run.optimizer_factory,
        run.lr_scheduler_factory,
        device=trainer.strategy.root_device,
        vectors=lora is None or lora.use_dora or bool(lora.modules_to_save),
        steps=length and length.steps,
    )
    if not any(objective.weight for objective in run.all_objectives.values()):
        raise ValueError(
            "model.objectives: every weight is 0, so there is nothing to train. Give at least one a weight above 0."
        )
    with arguments_of(run.source):
        run.source.check_trainer(trainer)
    _check_corpus(run, trainer)
    _check_tokens_per_batch(run, trainer)
    if length is not None:
        _check_interval(trainer, length)
    check_monitors(run, length)


def _check_corpus(run: DistillationRun, trainer: Any) -> None:
    if not len(run.corpus_objectives):
        return
    data: Any = trainer.datamodule
    corpus = getattr(data, "corpus", None)
    if corpus is None:
        if hasattr(data, "corpus"):
            raise ValueError(
                "model.corpus_objectives: there is no corpus. Set data.init_args.corpus; its path may be your own text."
            )
        return
    steps, rows = run.source.steps_per_batch(data.batch_size), corpus.batch_size // run.data_ranks.number
    if rows < steps:
        raise ValueError(
            f"data.init_args.corpus.batch_size: {corpus.batch_size} rows are {rows} on each rank, but a batch has {steps} "
            "optimiser steps. Give at least one row for each step and rank."
        )


def _check_tokens_per_batch(run: DistillationRun, trainer: Any) -> None:
    tokens = getattr(trainer.datamodule, "tokens_per_batch", None)
    if tokens is not None and run.source.steps_per_batch(LARGE_BATCH) != 1:
        raise ValueError(
            f"data.init_args.tokens_per_batch: {tokens}, but {type(run.source).__name__} makes several optimiser steps of a batch, "
            "and needs batches of one size. Set data.init_args.batch_size instead."
        )


def _check_interval(trainer: Any, length: RunLength) -> None:
    every = trainer.val_check_interval
    by_epochs = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches
    if by_epochs and isinstance(every, int) and every > length.batches_per_epoch:
        raise ValueError(
            f"trainer.val_check_interval: validation every {every} batches, but an epoch has only {length.batches_per_epoch}. Make "
            "it smaller, or set trainer.check_val_every_n_epoch: null to count batches across epochs."
        )
