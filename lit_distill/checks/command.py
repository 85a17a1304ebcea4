"""What the command line must not ask for, said before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_distill.checks.precision import check_precision

STRATEGIES = ("auto", "ddp", "fsdp2")
OTHER_STRATEGIES = ("ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
"""Which nobody needs; those that start processes otherwise are not for a command line."""
PROFILERS = ("simple", "advanced", "pytorch")
LARGEST_SEED = 2**32 - 1


def check_seed(seed: Any) -> None:
    """Refuse a ``seed_everything`` that numpy does not take."""
    if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed_everything: expected a whole number from 0 to {LARGEST_SEED}, got {seed}.")


def check_trainer_options(options: Mapping[str, Any], subcommand: str) -> None:
    """Look at what a Trainer is to be made of, where its own message would come late or mean something else.

    Raises:
        ValueError: naming the key, what was given and what to do.
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
            "trainer.enable_checkpointing: false, but every run has the callback of the key checkpoint. To keep no checkpoints, "
            "set checkpoint.save_top_k: 0 and checkpoint.save_last: false instead."
        )
    if options.get("barebones"):
        raise ValueError("trainer.barebones: true forbids the logs and checkpoints that every run has. Remove it.")
    _check_values(options)


def _check_values(options: Mapping[str, Any]) -> None:
    interval, every, profiler = (options.get(key) for key in ("val_check_interval", "log_every_n_steps", "profiler"))
    if not isinstance(interval, int | float | None):
        raise ValueError(
            f"trainer.val_check_interval: {interval} is a time, after which a resumed run validates elsewhere than one without "
            "interruption. Give a number of batches, or a share of an epoch."
        )
    if every is not None and every < 0:
        raise ValueError(f"trainer.log_every_n_steps: expected 0 (never) or more, got {every}.")
    if isinstance(profiler, str) and profiler not in PROFILERS:
        raise ValueError(f"trainer.profiler: expected one of {', '.join(PROFILERS)}, got {profiler!r}.")
    if options.get("model_registry"):
        raise ValueError(
            "trainer.model_registry: nothing is uploaded. Remove it, and upload the folders under export/ yourself."
        )


def check_writable(folder: Path, key: str) -> None:
    """Refuse a folder that can be neither written nor made.

    Raises:
        ValueError: naming the key.
    """
    folder = folder.expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}: {folder} cannot be written, as {there} cannot. Give a folder that can.")
