"""What every test that trains needs: a learner on the tiny pair, a Trainer that is quiet, and the weights at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import Objective


def learner_of(
    pair: tuple[Path, Path], objectives: Mapping[str, Objective], source=None, lr: float = 0.1, **settings: Any
) -> DistillationModule:
    """The student of ``pair`` beside its teacher, trained by plain gradient descent."""
    student, teacher = pair
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr)}
    specs = ModelSpec(str(student)), ModelSpec(str(teacher))
    return DistillationModule(specs[0], dict(objectives), specs[1], source, **{**sgd, **settings})


def quiet_trainer(folder: Path, max_steps: int, **settings: Any) -> L.Trainer:
    """On a processor, without validation, logs, checkpoints and bars, unless ``settings`` say otherwise."""
    quiet = {
        "accelerator": "cpu",
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=folder, max_steps=max_steps, **{**quiet, **settings})


def weights(learner: DistillationModule) -> Tensor:
    """All of the student's, in one row."""
    return torch.cat([p.detach().flatten() for p in learner.student.parameters()])
