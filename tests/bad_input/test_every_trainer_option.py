"""Every argument of Lightning's Trainer does what it says, or is refused in one message with what to use instead."""

from __future__ import annotations

import inspect
import re
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision
from training import learner_of, quiet_trainer

from lit_distill.data import ProceduralData
from lit_distill.objectives import ForwardKL

pytestmark = pytest.mark.slow

BATCHES = 4  # of an epoch

# argument -> values with which two steps are learnt; or (value, other arguments, steps) where it decides about that
WORKS: dict[str, list[Any]] = {
    "accelerator": ["cpu", "auto"],
    "strategy": ["auto"],  # ddp and fsdp2 need ranks: test_two_ranks.py, test_parallel.py
    "devices": [1, "auto"],
    "num_nodes": [1],  # more: test_slurm.py
    "precision": [None, "32-true", 32, "32", "bf16-mixed", "bf16"],
    "logger": [None, False, True, CSVLogger],
    "callbacks": [None, []],  # those of Lightning: test_every_lightning_callback.py
    "fast_dev_run": [(True, {}, 1), (2, {}, 2)],
    "max_epochs": [(1, {"max_steps": -1}, BATCHES), (1, {"max_steps": 3}, 3)],
    "min_epochs": [1],
    "max_steps": [(3, {}, 3), (-1, {"max_epochs": 1}, BATCHES)],
    "min_steps": [1],
    "max_time": ["00:00:10:00", {"minutes": 10}, ("00:00:00:00", {}, 0)],
    "limit_train_batches": [(1, {"max_steps": -1, "max_epochs": 2}, 2), (0.5, {"max_steps": -1, "max_epochs": 1}, 2)],
    "limit_val_batches": [0, 1, 1.0],
    "limit_test_batches": [1, 0.5],
    "limit_predict_batches": [1, 0.5],
    "overfit_batches": [1, 0.5, (1, {"max_steps": -1, "max_epochs": 3}, 3)],
    "val_check_interval": [1, 2, 0.5, 1.0],
    "check_val_every_n_epoch": [1, 2, (None, {"val_check_interval": 6, "max_steps": 6}, 6)],
    "num_sanity_val_steps": [0, 1, -1],
    "log_every_n_steps": [0, 1, 50],
    "enable_checkpointing": [None, True],
    "enable_progress_bar": [True, False],
    "enable_model_summary": [True, False],
    "accumulate_grad_batches": [1],
    "gradient_clip_val": [None, 0, 1.0],
    "gradient_clip_algorithm": [("norm", {"gradient_clip_val": 1.0}, 2), ("value", {"gradient_clip_val": 1.0}, 2)],
    "deterministic": [True, "warn"],
    "benchmark": [True],
    "inference_mode": [True, False],
    "use_distributed_sampler": [True, False],
    "profiler": ["simple", "advanced", "pytorch"],
    "detect_anomaly": [True],
    "barebones": [False],
    "plugins": [
        lambda _: MixedPrecision("bf16-mixed", "cpu"),
        lambda _: LightningEnvironment(),
        lambda _: TorchSyncBatchNorm(),
    ],
    "sync_batchnorm": [True],
    "reload_dataloaders_every_n_epochs": [(1, {"max_steps": 6}, 6)],
    "default_root_dir": [],  # every case here
    "enable_autolog_hparams": [True, False],
    "model_registry": [None],
}
PLUGINS = "lightning.pytorch.plugins."
REFUSED: dict[str, list[tuple[Any, str]]] = {
    "accelerator": [("gpu", r"trainer\.accelerator: "), ("abacus", r"trainer\.accelerator: ")],
    "strategy": [
        ("fsdp", r"trainer\.strategy: .*fsdp2"),
        ("deepspeed", r"trainer\.strategy: .*fsdp2, got 'deepspeed'"),
    ],
    "devices": [(0, r"trainer\.devices"), (-3, r"trainer\.devices")],
    "precision": [
        *((name, rf"trainer\.precision: {name} .*32-true or bf16-mixed") for name in ("64-true", "64", 64)),
        *((name, rf"trainer\.precision: {name} overflows") for name in ("16-mixed", "16-true", "16", 16)),
        ("bf16-true", r"trainer\.precision: bf16-true .*model\.student\.dtype: bfloat16"),
        ("transformer-engine", r"trainer\.precision: transformer-engine .*32-true"),
        ("transformer-engine-float16", r"trainer\.precision: transformer-engine-float16 .*32-true"),
    ],
    "logger": [("Nothing", r"trainer\.logger.*\n(.*\n)*.*There is no class 'Nothing'")],
    "fast_dev_run": [(-1, r"trainer.*fast_dev_run")],
    "max_epochs": [(0, r"trainer\.max_epochs: 0"), (-2, r"trainer.*max_epochs")],
    "max_steps": [(0, r"trainer\.max_steps: 0"), (-2, r"trainer.*max_steps")],
    "max_time": [("soon", r"trainer.*max_time|trainer.*'soon'")],
    "limit_train_batches": [(0, r"trainer\.limit_train_batches: 0"), (1.5, r"limit_train_batches")],
    "limit_val_batches": [(-1, r"limit_val_batches")],
    "limit_test_batches": [(-1, r"limit_test_batches")],
    "limit_predict_batches": [(-1, r"limit_predict_batches")],
    "overfit_batches": [(1, r"trainer\.val_check_interval: validation every 2 batches, but an epoch has only 1")],
    "val_check_interval": [
        ("00:00:10:00", r"trainer\.val_check_interval: 00:00:10:00 is a time.*number of batches"),
        ({"minutes": 1}, r"trainer\.val_check_interval: .*is a time"),
        (100, r"trainer\.val_check_interval: validation every 100 batches"),
    ],
    "check_val_every_n_epoch": [(1.5, r"check_val_every_n_epoch")],
    "log_every_n_steps": [(-1, r"trainer\.log_every_n_steps: expected 0 \(never\) or more, got -1")],
    "enable_checkpointing": [(False, r"trainer\.enable_checkpointing: .*checkpoint\.save_top_k: 0")],
    "accumulate_grad_batches": [(2, r"trainer\.accumulate_grad_batches: .*model\.micro_batch_size")],
    "gradient_clip_val": [(-1.0, r"trainer\.gradient_clip_val: .* got -1")],
    "gradient_clip_algorithm": [("median", r"gradient_clip_algorithm")],
    "profiler": [("xla", r"trainer\.profiler: expected one of simple, advanced, pytorch, got 'xla'")],
    "barebones": [(True, r"trainer\.barebones: true")],
    "plugins": [
        ({"class_path": f"{PLUGINS}precision.DoublePrecision"}, r"trainer\.precision: 64-true"),
        (
            {"class_path": f"{PLUGINS}precision.HalfPrecision", "init_args": {"precision": "bf16-true"}},
            r"trainer\.precision: bf16-true",
        ),
        ({"class_path": f"{PLUGINS}io.AsyncCheckpointIO"}, r"trainer\.plugins: AsyncCheckpointIO .*written atomically"),
    ],
    "reload_dataloaders_every_n_epochs": [(-1, r"reload_dataloaders_every_n_epochs")],
    "model_registry": [("mine/model", r"trainer\.model_registry: lit-distill uploads nothing.*export/")],
}
IN_PYTHON: list[tuple[dict[str, Any], str]] = [
    ({"precision": "64-true"}, r"trainer\.precision: 64-true"),
    ({"precision": "bf16-true"}, r"trainer\.precision: bf16-true"),
    ({"plugins": DoublePrecision()}, r"trainer\.precision: 64-true"),
    ({"plugins": HalfPrecision("bf16-true")}, r"trainer\.precision: bf16-true"),
    ({"plugins": AsyncCheckpointIO()}, r"trainer\.plugins: AsyncCheckpointIO"),
    ({"val_check_interval": "00:00:00:10"}, r"trainer\.val_check_interval: .*a time"),
    ({"limit_train_batches": 1, "val_check_interval": 2}, r"trainer\.val_check_interval: .* an epoch has only 1\."),
]


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, values in table.items()
        for number, value in enumerate(values)
    ]


def test_somebody_has_decided_about_every_argument_of_this_lightning() -> None:
    arguments = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    undecided = arguments ^ (WORKS.keys() | REFUSED.keys())
    assert not undecided, f"decide about it: a Trainer's {sorted(undecided)} is new or gone"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), cases(WORKS))
def test_an_argument_works(pair, tmp_path, monkeypatch, name: str, value: Any) -> None:
    monkeypatch.chdir(tmp_path)
    value, others, steps = value if isinstance(value, tuple) else (value, {}, 2)
    value = value(tmp_path) if callable(value) else value
    settings = {"limit_val_batches": 1.0, "val_check_interval": 1.0, "max_steps": 2, **others, name: value}
    trainer = quiet_trainer(tmp_path, **settings)
    data = ProceduralData(num_train=4 * BATCHES, num_validation=4, num_test=2, batch_size=4, eval_batch_size=2)
    trainer.fit(learner_of(pair, {"kd": ForwardKL()}), data)
    assert trainer.global_step == steps


@pytest.mark.parametrize(("name", "given"), cases(REFUSED))
def test_an_argument_is_refused_with_its_key_and_what_to_use(refusal, name: str, given: tuple[Any, str]) -> None:
    value, words = given
    message = refusal({f"trainer.{name}": value})
    assert re.search(words, message, re.DOTALL), message


@pytest.mark.parametrize(("settings", "words"), IN_PYTHON)
def test_a_trainer_made_in_python_is_refused_alike(pair, tmp_path, settings: dict[str, Any], words: str) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2, **{"limit_val_batches": 1.0, **settings})
    data = ProceduralData(num_train=8, num_validation=4, num_test=2, batch_size=4)
    with pytest.raises(ValueError, match=words):
        trainer.fit(learner_of(pair, {"kd": ForwardKL()}), data)
