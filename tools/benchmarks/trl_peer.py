"""The peer TRL, an extra of its own: whether it is installed, and one step of its on-policy `DistillationTrainer`."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from benchmarks.training import Step, StepMeter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from benchmarks.measure import Bench
    from benchmarks.models import Pair

NOT_INSTALLED = "TRL is not installed (pip install trl accelerate)"


@cache
def installed() -> bool:
    """Whether TRL and what its trainers need can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("trl", "accelerate"))


class _Watch(TrainerCallback):
    """Meters the steps of transformers' Trainer, with the generation in them."""

    def __init__(self, meter: StepMeter) -> None:
        self.meter = meter
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Start the clock."""
        self.meter.begin(parts["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Stop it."""
        self.meter.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **parts: Any) -> None:
        """Record the loss."""
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def word_tokenizer(vocabulary_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer of the words t0, t1, …: their numbers are the tokens. What pads and ends a text no model can generate."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(vocabulary_size)} | {"<end>": vocabulary_size}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))  # noqa: S106 - no secret
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = dict.fromkeys(("eos_token", "pad_token"), "<end>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def on_policy_step(bench: Bench, pair: Pair, prompts: Tensor, new_tokens: int, rate: float, memory: bool) -> Step:
    """Two steps of `DistillationTrainer` with reverse KL (beta 1) on the student's own responses; the second is measured.

    Args:
        bench: device and precision.
        pair: both models; the student is trained.
        prompts: ``[B, P]`` int64, without padding.
        new_tokens: tokens of each response.
        rate: learning rate.
        memory: measure the peak memory of the step, instead of a time that counts.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    texts = [" ".join(f"t{token}" for token in row) for row in prompts.tolist()]
    mixed = bench.precision == "bf16-mixed"
    settings = DistillationConfig(
        output_dir=str(Path(bench.machine.folder) / "trl"), per_device_train_batch_size=len(texts), max_steps=2,
        max_completion_length=new_tokens, beta=1.0, learning_rate=rate, weight_decay=0.01, optim="adamw_torch",
        max_grad_norm=0.0, lr_scheduler_type="constant", gradient_checkpointing=False, bf16=mixed, fp16=False,
        use_cpu=not bench.machine.cuda, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        shuffle_dataset=False, dataloader_pin_memory=bench.machine.cuda,
    )  # fmt: skip
    watch = _Watch(StepMeter(bench.machine, memory))
    student = pair.student.model
    trainer = DistillationTrainer(
        model=student,
        teacher_model=pair.teacher.lm.model,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": texts * 2}),
        processing_class=word_tokenizer(pair.vocabulary_size),
        callbacks=[watch],
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.train()
    for model in (trainer.model, trainer.teacher_model):  # under mixed precision it has wrapped their forward
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    student.zero_grad()
    student.eval()
    return Step(watch.meter.seconds[-1], watch.losses[-1], watch.meter.peak)
