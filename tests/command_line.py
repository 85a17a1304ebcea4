"""The command line in this process, on tiny models and generated tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from lit_distill.cli import DistillCLI


def tiny_config(pair: tuple[Path, Path], **model: Any) -> dict[str, Any]:
    """Everything that a run needs, small."""
    student, teacher = pair
    return {
        "seed_everything": 3,
        "model": {
            "student": {"path": str(student)},
            "teacher": {"path": str(teacher)},
            "objectives": {"kd": "ForwardKL", "ce": {"class_path": "NextToken", "init_args": {"weight": 0.5}}},
            **model,
        },
        "data": {
            "class_path": "ProceduralData",
            "init_args": {"num_train": 48, "num_validation": 10, "num_test": 4, "batch_size": 8, "eval_batch_size": 4},
        },
        "trainer": {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1},
        "generation": {"max_new_tokens": 4},
    }


def write(config: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def run(*arguments: object, **settings: Any) -> DistillCLI:
    """What `lit-distill` with these arguments does, without the console script around it."""
    with patch.object(sys, "argv", ["lit-distill"]):
        return DistillCLI([str(argument) for argument in arguments], **settings)
