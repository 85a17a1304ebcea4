"""Checks on the command line's options, before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_distill.validation.precision import check_precision

STRATEGIES = ("auto", "ddp", "fsdp2")
OTHER_STRATEGIES = ("ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
"""Accepted but not listed in messages. Strategies that start processes in other ways do not work from a command line."""
PROFILERS = ("simple", "advanced", "pytorch")
LARGEST_SEED = 2**32 - 1


def check_seed(seed: Any) -> None:
    """Refuse a ``seed_everything`` that numpy does not accept."""
    if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed_everything: expected a whole number from 0 to {LARGEST_SEED}, got {seed}.")


def check_trainer_options(options: Mapping[str, Any], subcommand: str) -> None:
    """Check the Trainer's options for which its own message would come late or be misleading.

    Raises:
        ValueError: with the key, what was given and what to do.
    """
    strategy = options.get("strategy")
    if isinstance(strategy, str) and strategy not in (*STRATEGIES, *OTHER_STRATEGIES):
        raise ValueError(
            f"trainer.strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}. fsdp2 shards student and teacher, ddp "
            "keeps both whole on each device."
        )
    check_precision(options.get("precision"), trains=subcommand == "fit")
    if subcommand == "fit" and options.get("enable_checkpointing") is False:
        raise ValueError(
            "trainer.enable_checkpointing: false, but every run has the callback under the key checkpoint. To keep no checkpoints, "
            "set checkpoint.save_top_k: 0 and checkpoint.save_last: false instead."
        )
    if options.get("barebones"):
        raise ValueError("trainer.barebones: true forbids the logs and checkpoints that every run has. Remove it.")
    _check_values(options)


def _check_values(options: Mapping[str, Any]) -> None:
    interval, every, profiler = (options.get(key) for key in ("val_check_interval", "log_every_n_steps", "profiler"))
    if not isinstance(interval, int | float | None):
        raise ValueError(
            f"trainer.val_check_interval: {interval} is a time, so a resumed run would validate at other batches than an "
            "uninterrupted one. Give a number of batches, or a share of an epoch."
        )
    if every is not None and every < 0:
        raise ValueError(f"trainer.log_every_n_steps: expected 0 (never) or more, got {every}.")
    if isinstance(profiler, str) and profiler not in PROFILERS:
        raise ValueError(f"trainer.profiler: expected one of {', '.join(PROFILERS)}, got {profiler!r}.")
    if options.get("model_registry"):
        raise ValueError(
            "trainer.model_registry: lit-distill uploads nothing. Remove it, and upload the folders in export/ yourself."
        )


def check_writable(folder: Path, key: str) -> None:
    """Refuse a folder that is not writable and cannot be created.

    Raises:
        ValueError: with the key.
    """
    folder = folder.expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"{key}: {folder} cannot be written, because {existing} is not a writable folder. Give another folder."
        )
