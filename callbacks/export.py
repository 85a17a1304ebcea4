"""The student as a Hugging Face folder, after training and from any checkpoint."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.models import ModelSpec, load_tokenizer
from lit_distill.parallel import gathered, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_distill.module import DistillationModule

STUDENT_PREFIX = "student.model."


class HuggingFaceExport(Callback):
    """At the end of `fit`, writes ``export/last`` and ``export/best`` below the run's folder, with tokenizer and generation config.

    ``best`` is the best checkpoint of the first `ModelCheckpoint` that monitors a figure, where there is one.

    Args:
        enabled: whether to export at all.
        dtype: of the written weights; the student's own by default.
    """

    def __init__(self, enabled: bool = True, dtype: str | None = None) -> None:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"export.dtype: expected float32, bfloat16, float16 or null, got {dtype!r}.")
        self.enabled = enabled
        self.dtype = dtype
        self.folders: dict[str, Path] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Write the folders and say where they are."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = Path(trainer.log_dir or trainer.default_root_dir) / "export"  # all ranks ask, since one tells the others
        state = gathered(trainer.strategy.lightning_module_state_dict(), keep=trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        model, weights = pl_module.student.model, student_weights(state)
        self.folders["last"] = save_folder(model, weights, pl_module.tokenizer, root / "last", self.dtype)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
                self.folders["best"] = export_checkpoint(Path(callback.best_model_path), root / "best", self.dtype)
                break
        for name, folder in self.folders.items():
            rank_zero_info(f"Exported the {name} student to {folder}")


def export_checkpoint(checkpoint: Path, folder: Path, dtype: str | None = None) -> Path:
    """Write the student of a Lightning checkpoint as a Hugging Face folder.

    Args:
        checkpoint: of `DistillationModule`: a ``.ckpt`` file, or a folder into which each rank has written its shards.
        folder: where to; replaced if it exists.
        dtype: of the written weights; as stored by default.

    Raises:
        ValueError: if it is no such checkpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    content: Any = read_checkpoint(checkpoint, parts=["state_dict"])
    if not isinstance(content, dict) or "student" not in content:
        raise ValueError(
            f"{checkpoint} is not a checkpoint of a DistillationModule: it does not say what its student is."
        )
    saved = content["student"]
    spec = ModelSpec(**saved["spec"])
    config = AutoConfig.for_model(**saved["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    model.generation_config = GenerationConfig.from_dict(saved["generation_config"])
    weights = student_weights(content["state_dict"])
    return save_folder(model, weights, load_tokenizer(spec, "model.student"), folder, dtype)


def student_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's own weights out of the module's, under the names that transformers gives them."""
    return {k.removeprefix(STUDENT_PREFIX): v for k, v in state.items() if k.startswith(STUDENT_PREFIX)}


def save_folder(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], tokenizer: Any, folder: Path, dtype: str | None
) -> Path:
    """`save_pretrained` of ``weights`` in the shape of ``model``, with its tokenizer, all or nothing."""
    if dtype:
        weights = {name: w.to(getattr(torch, dtype)) if w.is_floating_point() else w for name, w in weights.items()}
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        tied = set(model._tied_weights_keys or ())  # by name: stored once, and tied again when they are loaded
        weights = {name: weight for name, weight in weights.items() if name not in tied}
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    written = next(w.dtype for w in weights.values() if w.is_floating_point())
    model.save_pretrained(unfinished, state_dict=weights)
    config = copy.deepcopy(model.config)
    config.dtype = written  # decides in what dtype the folder loads; `save_pretrained` has noted that of `model`
    config.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    return unfinished.rename(folder)
