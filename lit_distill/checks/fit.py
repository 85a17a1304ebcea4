"""What a run that is about to begin must not be: Trainer, data, source and optimiser together, before any weights load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.checks.callbacks import check_callbacks
from lit_distill.checks.monitors import check_monitors
from lit_distill.checks.optimizer import check_optimizer
from lit_distill.checks.precision import check_plugins, check_precision
from lit_distill.checks.run_length import RunLength, has_validation, run_length

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

REFUSED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def check_strategy(trainer: Any) -> None:
    """Look at how a Lightning Trainer spreads a `DistillationModule` over devices.

    Raises:
        ValueError: if the strategy would cut the student into shards in a way of its own.
    """
    name = type(trainer.strategy).__name__
    if name in REFUSED_STRATEGIES:
        raise ValueError(
            f"trainer.strategy: {name} does not know the teacher, and its shards not the chunked head. Use fsdp2, which shards "
            "both models, or ddp, where both fit on each device."
        )


def check_trainer(trainer: Any) -> None:
    """Look at a Lightning Trainer that is about to fit a `DistillationModule`.

    Raises:
        ValueError: naming the key, what was given and what to do.
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
    if not hasattr(trainer, "val_check_interval"):  # Lightning leaves it out where it is a time
        raise ValueError("trainer.val_check_interval: expected a number of batches or a share of an epoch, got a time.")
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"trainer.{name}: 0 would learn nothing. Give a larger number, or remove the key.")
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        raise ValueError(
            f"trainer.gradient_clip_val: {trainer.gradient_clip_val} is no norm. Give 0 (off) or more; usual is 1.0."
        )
    validates = has_validation(trainer)
    for callback in trainer.callbacks:
        if type(callback) is ModelCheckpoint and callback._every_n_train_steps > 0:
            raise ValueError(
                f"trainer.callbacks: ModelCheckpoint compares the step modulo every_n_train_steps "
                f"({callback._every_n_train_steps}), and a batch of many steps may miss it for ever. Set "
                "checkpoint.every_n_train_steps, or class_path: RunCheckpoint, which saves at the end of such a batch."
            )
        if isinstance(callback, ModelCheckpoint) and (callback.monitor or "").startswith("val/") and not validates:
            raise ValueError(
                f"checkpoint.monitor: {callback.monitor} is watched, and there is no validation. Set "
                "data.init_args.validation or validation_size, or checkpoint.monitor: null."
            )


def check_fit(module: DistillationModule) -> None:
    """Look at a run that is about to begin: Trainer, data, source and objectives together; no weights are loaded yet.

    Raises:
        ValueError: naming the key, what was given and what to do.
    """
    trainer: Any = module.trainer
    check_trainer(trainer)
    length = run_length(trainer, module.source)
    lora = module.student_spec.lora
    check_optimizer(
        module.optimizer_factory,
        module.lr_scheduler_factory,
        device=trainer.strategy.root_device,
        vectors=lora is None or lora.use_dora or bool(lora.modules_to_save),
        steps=length and length.steps,
    )
    if not any(objective.weight for objective in module.all_objectives.values()):
        raise ValueError("model.objectives: every weight is 0, so there is nothing to learn. Give one a weight.")
    module.source.check_trainer(trainer)
    _check_corpus(module, trainer)
    if length is not None:
        _check_interval(trainer, length)
    check_monitors(module, length)


def _check_corpus(module: DistillationModule, trainer: Any) -> None:
    if not len(module.corpus_objectives):
        return
    data: Any = trainer.datamodule
    corpus = getattr(data, "corpus", None)
    if corpus is None:
        if hasattr(data, "corpus"):
            raise ValueError(
                "model.corpus_objectives: there is no corpus. Set data.init_args.corpus, which for your own text takes a path."
            )
        return
    steps, rows = module.source.steps_per_batch(data.batch_size), corpus.batch_size // module.data_ranks.number
    if rows < steps:
        raise ValueError(
            f"data.init_args.corpus.batch_size: {corpus.batch_size} rows are {rows} on each rank, for the {steps} optimiser steps "
            "that a batch is good for. Give at least one row a step and rank."
        )


def _check_interval(trainer: Any, length: RunLength) -> None:
    every = trainer.val_check_interval
    by_epochs = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches
    if by_epochs and isinstance(every, int) and every > length.batches_per_epoch:
        raise ValueError(
            f"trainer.val_check_interval: validation every {every} batches, and an epoch has {length.batches_per_epoch}. Make it "
            "smaller, or set trainer.check_val_every_n_epoch: null to count over epochs."
        )
