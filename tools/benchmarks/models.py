"""Models with random weights and fixed seeds, and the texts that the rows run them on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gpu_checks.speed import QWEN_HALF, QWEN_SEVEN
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from benchmarks.measure import Bench
from lit_distill.models import CausalLM
from lit_distill.models.caching import caching_of
from lit_distill.models.packing import check_packing
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Prompts, Sequences

ENDLESS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""No token ends a text: the lengths are those of the benchmark."""


class Pair(NamedTuple):
    """A student, a teacher, and their names for the counters."""

    student: CausalLM
    teacher: FrozenTeacher

    @property
    def models(self) -> dict[str, CausalLM]:
        """Both, by role."""
        return {"student": self.student, "teacher": self.teacher.lm}

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return self.student.vocabulary_size


def smol_config(layers: int) -> LlamaConfig:
    """The shape of SmolLM2-135M (30 layers), with another number of layers."""
    return LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, **ENDLESS,
    )  # fmt: skip


def tiny_config(layers: int = 2, vocabulary_size: int = 512, width: int = 32) -> LlamaConfig:
    """A model that takes no time."""
    return LlamaConfig(
        vocab_size=vocabulary_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, **ENDLESS,
    )  # fmt: skip


def qwen_config(config: Qwen2Config) -> Qwen2Config:
    """The shape of a Qwen2.5 model, with the vocabulary of the 0.5B model: TRL takes equal vocabularies only."""
    return Qwen2Config.from_dict({**config.to_dict(), "vocab_size": QWEN_HALF.vocab_size, **ENDLESS})


def causal_lm(bench: Bench, config: Any, seed: int, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model of ``config`` on the device, with random weights that depend on ``seed`` alone."""
    torch.manual_seed(seed)
    with bench.machine.device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lm = CausalLM(model.eval(), config.vocab_size)
    caching_of(lm, bench.machine.device)  # tried once, outside of what is measured
    lm.cuda_graphs = bench.machine.cuda
    return lm


def pair_of(bench: Bench, student_layers: int = 10) -> Pair:
    """The pair of most rows: SmolLM2's shape on a processor (teacher 30 layers), Qwen2.5 0.5B and 7B on CUDA.

    Both keep the texts of a packed row apart, as `check_packing` finds out.

    Args:
        bench: device and sizes.
        student_layers: layers of the student on a processor.
    """
    half, seven = qwen_config(QWEN_HALF), qwen_config(QWEN_SEVEN)
    student = bench.size(tiny_config(1), smol_config(student_layers), half)
    teacher = bench.size(tiny_config(2), smol_config(30), seven)
    models = causal_lm(bench, student, 0), causal_lm(bench, teacher, 1, bench.teacher_dtype)
    for role, lm in zip(("student", "teacher"), models, strict=True):
        check_packing(lm, role, bench.machine.device)
    return Pair(models[0], FrozenTeacher(models[1]))


def random_ids(bench: Bench, vocabulary_size: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    """``[rows, columns]`` int64 random tokens; neither of the last one, which P6 uses to end a response."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary_size - 1, (rows, columns), generator=generator).to(bench.machine.device)


def random_prompts(bench: Bench, vocabulary_size: int, rows: int, columns: int, seed: int = 0) -> Prompts:
    """Prompts of one length."""
    ids = random_ids(bench, vocabulary_size, rows, columns, seed)
    return Prompts(ids, torch.ones_like(ids))


def random_texts(bench: Bench, vocabulary_size: int, lengths: Tensor, seed: int = 0) -> Sequences:
    """Texts of ``lengths`` ``[B]`` tokens, padded on the right; the first quarter of each is its prompt, the rest are targets."""
    lengths = lengths.to(bench.machine.device)
    ids = random_ids(bench, vocabulary_size, len(lengths), int(lengths.max()), seed)
    columns = torch.arange(ids.shape[1], device=ids.device)
    mask = columns < lengths[:, None]
    targets = mask & (columns >= (lengths[:, None] // 4).clamp(min=1))
    return Sequences(ids * mask, mask.long(), targets)
