"""Exports the student as a Hugging Face folder, after training or from any checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.callbacks.folders import save_adapted, save_folder
from lit_distill.distributed import gathered, read_checkpoint
from lit_distill.models import CausalLM, load_tokenizer
from lit_distill.models.merging import adapted_model, check_exportable
from lit_distill.models.readback import Expected, expected_of, expected_of_weights
from lit_distill.models.safetensors_reader import parameters_on_meta
from lit_distill.models.spec import spec_of
from lit_distill.types import arguments_of

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

STUDENT_PREFIX = "student.model."


class HuggingFaceExport(Callback):
    """At the end of `fit`, writes ``export/last`` and ``export/best`` below the run's folder, with tokenizer and generation config.

    ``best`` is the best checkpoint of the first `ModelCheckpoint` that monitors a metric, if there is one.

    Args:
        enabled: whether to export.
        dtype: dtype of the written weights; by default that of the student.
        merge_lora: merge the adapters of a student (`model.student.lora`) into one plain model. If false, write only the adapter,
            for peft.
        verify: read each folder back once and compare its outputs with those of the trained student; a difference is an error, and
            the folder is renamed to ``last.wrong``. This needs host memory for one more copy of the model.
    """

    def __init__(
        self, enabled: bool = True, dtype: str | None = None, merge_lora: bool = True, verify: bool = True
    ) -> None:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16, float16 or null, got {dtype!r}.")
        self.enabled = enabled
        self.dtype = dtype
        self.merge_lora = merge_lora
        self.verify = verify
        self.folders: dict[str, Path] = {}

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Refuse, before any weights load, a student that cannot be exported."""
        if self.enabled and stage == "fit":
            with arguments_of(self):
                check_exportable(pl_module.student_spec, self.merge_lora)

    def on_fit_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Write the folders and log their paths.

        Raises:
            ValueError: if a folder does not reproduce the student; the other folder is still written.
        """
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = Path(trainer.log_dir or trainer.default_root_dir) / "export"  # on all ranks: log_dir is broadcast
        student = pl_module.student
        runs_here = self.verify and (trainer.is_global_zero or student.forward_is_collective)
        expected = expected_of(student, trainer.strategy.root_device) if runs_here else None
        state = gathered(trainer.strategy.lightning_module_state_dict(), keep=trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        weights = student_weights(state)
        failures = [self._attempt("last", root, lambda folder: self._write_last(pl_module, weights, expected, folder))]
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
                best = Path(callback.best_model_path)
                write = partial(
                    export_checkpoint, best, dtype=self.dtype, merge_lora=self.merge_lora, verify=self.verify
                )
                failures.append(self._attempt("best", root, write))
                break
        if errors := [failure for failure in failures if failure]:
            raise ValueError("\n".join([*errors, "The run's checkpoints are unchanged."]))

    def _attempt(self, name: str, root: Path, write: Callable[[Path], Path]) -> str | None:
        """Write one folder; returns an error message instead of raising it, so that the other folder is written too."""
        try:
            self.folders[name] = write(root / name)
        except ValueError as error:
            return f"export/{name}: {error}"
        rank_zero_info(f"Exported the {name} student to {self.folders[name]}")
        return None

    def _write_last(
        self, pl_module: DistillationModule, weights: dict[str, torch.Tensor], expected: Expected | None, folder: Path
    ) -> Path:
        model, spec, tokenizer = pl_module.student.model, pl_module.student_spec, pl_module.tokenizer
        if spec.lora is None:
            return save_folder(model, weights, tokenizer, folder, self.dtype, expected, spec.trust_remote_code)
        if pl_module.student.forward_is_collective:  # read the base again instead of gathering it
            model = adapted_model(spec, {"spec": asdict(spec), "base": pl_module.student.base_fingerprint}, weights)
        return save_adapted(model, spec, tokenizer, folder, self.dtype, self.merge_lora, expected)


def export_checkpoint(
    checkpoint: Path, folder: Path, dtype: str | None = None, merge_lora: bool = True, verify: bool = True
) -> Path:
    """Write the student of a Lightning checkpoint as a Hugging Face folder.

    Args:
        checkpoint: checkpoint of a `DistillationModule`: a ``.ckpt`` file, or a folder with the shards of each rank.
        folder: output folder; replaced if it exists.
        dtype: dtype of the written weights; as stored by default.
        merge_lora: merge adapters into their base model, which is read again from its path; otherwise write only the adapters.
        verify: read the folder back and compare its outputs with those of the checkpoint's student.

    Raises:
        ValueError: if it is not such a checkpoint, if the base model of its adapters is missing, or if the folder does not
            reproduce its student.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    content: Any = read_checkpoint(checkpoint, parts=["state_dict"])
    if not isinstance(content, dict) or "student" not in content:
        raise ValueError(
            f"{checkpoint} is not a checkpoint of a DistillationModule: it has no description of a student."
        )
    saved = content["student"]
    spec, weights = spec_of(saved["spec"]), student_weights(content["state_dict"])
    check_exportable(spec, merge_lora)
    tokenizer = load_tokenizer(spec, "model.student")
    if spec.lora is not None:
        model = adapted_model(spec, saved, weights)
        expected = expected_of(CausalLM(model)) if verify else None
        return save_adapted(model, spec, tokenizer, folder, dtype, merge_lora, expected)
    config = AutoConfig.for_model(**saved["config"])
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    model.generation_config = GenerationConfig.from_dict(saved["generation_config"])
    expected = expected_of_weights(model, weights) if verify else None
    return save_folder(model, weights, tokenizer, folder, dtype, expected, spec.trust_remote_code)


def student_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's weights from the module's state, with their names in transformers."""
    return {k.removeprefix(STUDENT_PREFIX): v for k, v in state.items() if k.startswith(STUDENT_PREFIX)}
