"""The student as a Hugging Face folder, after training and from any checkpoint."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.models import ModelSpec, load_tokenizer
from lit_distill.models.merging import adapted_model, check_exportable, merged_weights, save_adapter
from lit_distill.models.spec import spec_of
from lit_distill.models.tying import mark_untied, tied_names
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
        merge_lora: of a student with adapters (`model.student.lora`) write one plain model. If false, write the adapter alone, for
            peft.
    """

    def __init__(self, enabled: bool = True, dtype: str | None = None, merge_lora: bool = True) -> None:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"export.dtype: expected float32, bfloat16, float16 or null, got {dtype!r}.")
        self.enabled = enabled
        self.dtype = dtype
        self.merge_lora = merge_lora
        self.folders: dict[str, Path] = {}

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Refuse, before any weights load, what could not be written in the end."""
        if self.enabled and stage == "fit":
            check_exportable(pl_module.student_spec, self.merge_lora)

    def on_fit_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Write the folders and say where they are."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = Path(trainer.log_dir or trainer.default_root_dir) / "export"  # all ranks ask, since one tells the others
        state = gathered(trainer.strategy.lightning_module_state_dict(), keep=trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        model, spec, tokenizer = pl_module.student.model, pl_module.student_spec, pl_module.tokenizer
        if spec.lora is None:
            self.folders["last"] = save_folder(model, student_weights(state), tokenizer, root / "last", self.dtype)
        else:
            if pl_module.student.runs_together:  # the base is read again, rather than gathered
                saved = {"spec": asdict(spec), "base": pl_module.student.base_fingerprint}
                model = adapted_model(spec, saved, student_weights(state))
            self.folders["last"] = save_adapted(model, spec, tokenizer, root / "last", self.dtype, self.merge_lora)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
                self.folders["best"] = export_checkpoint(
                    Path(callback.best_model_path), root / "best", self.dtype, self.merge_lora
                )
                break
        for name, folder in self.folders.items():
            rank_zero_info(f"Exported the {name} student to {folder}")


def export_checkpoint(checkpoint: Path, folder: Path, dtype: str | None = None, merge_lora: bool = True) -> Path:
    """Write the student of a Lightning checkpoint as a Hugging Face folder.

    Args:
        checkpoint: of `DistillationModule`: a ``.ckpt`` file, or a folder into which each rank has written its shards.
        folder: where to; replaced if it exists.
        dtype: of the written weights; as stored by default.
        merge_lora: merge adapters into their base, which is read again from where it was; else write them alone.

    Raises:
        ValueError: if it is no such checkpoint, or the base of its adapters is not to be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    content: Any = read_checkpoint(checkpoint, parts=["state_dict"])
    if not isinstance(content, dict) or "student" not in content:
        raise ValueError(
            f"{checkpoint} is not a checkpoint of a DistillationModule: it does not say what its student is."
        )
    saved = content["student"]
    spec, weights = spec_of(saved["spec"]), student_weights(content["state_dict"])
    check_exportable(spec, merge_lora)
    tokenizer = load_tokenizer(spec, "model.student")
    if spec.lora is not None:
        return save_adapted(adapted_model(spec, saved, weights), spec, tokenizer, folder, dtype, merge_lora)
    config = AutoConfig.for_model(**saved["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    model.generation_config = GenerationConfig.from_dict(saved["generation_config"])
    return save_folder(model, weights, tokenizer, folder, dtype)


def student_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's own weights out of the module's, under the names that transformers gives them."""
    return {k.removeprefix(STUDENT_PREFIX): v for k, v in state.items() if k.startswith(STUDENT_PREFIX)}


def save_adapted(
    model: PreTrainedModel, spec: ModelSpec, tokenizer: Any, folder: Path, dtype: str | None, merge: bool
) -> Path:
    """A student with adapters as one plain model in the dtype of its base, or as the adapter alone, all or nothing."""
    from transformers import AutoModelForCausalLM

    if merge:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.config, trust_remote_code=spec.trust_remote_code)
        plain.generation_config = model.generation_config
        own = next(str(p.dtype) for p in model.parameters() if not p.requires_grad).removeprefix("torch.")
        return save_folder(plain, merged_weights(model), tokenizer, folder, dtype or own)
    with replacing(folder) as unfinished:
        save_adapter(model, spec, unfinished, getattr(torch, dtype) if dtype else None)
        tokenizer.save_pretrained(unfinished)
    return folder


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` once it is complete."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def save_folder(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], tokenizer: Any, folder: Path, dtype: str | None
) -> Path:
    """`save_pretrained` of ``weights`` in the shape of ``model``, with its tokenizer, all or nothing."""
    config = copy.deepcopy(model.config)
    tied = {name: source for name, source in tied_names(model).items() if {name, source} <= weights.keys()}
    if all(_same(weights[name], weights[source]) for name, source in tied.items()):
        weights = {name: weight for name, weight in weights.items() if name not in tied}  # tied again on loading
    else:  # by the weights, whatever the config of an older checkpoint says; each then has memory of its own
        mark_untied(config)
        weights = {**weights, **{name: weights[name].clone() for name in tied}}
    if dtype:
        weights = {name: w.to(getattr(torch, dtype)) if w.is_floating_point() else w for name, w in weights.items()}
    written = next(w.dtype for w in weights.values() if w.is_floating_point())
    with replacing(folder) as unfinished:
        model.save_pretrained(unfinished, state_dict=weights)
        config.dtype = written  # decides in what dtype the folder loads; `save_pretrained` has noted that of `model`
        config.architectures = model.config.architectures
        config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)
