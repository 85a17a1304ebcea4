"""Texts that a model cannot read, since they are too long or hold tokens it does not have, are refused before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_distill.models import load_tokenizer, shared_ids
from lit_distill.models.spec import load_config

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}
KEYS = {"GenerationEvaluator": "generation", "ExposureBiasMonitor": "exposure_bias"}


class Reading(NamedTuple):
    """Something that the models read."""

    key: str
    tokens: int
    what: str


def check_lengths(module: DistillationModule, stage: str) -> None:
    """Compare the items of the data, and what is to be written after their prompts, with what the models can read.

    Args:
        module: its data module may say how long the items are (``longest``); otherwise nothing is compared.
        stage: fit, validate, test or predict.

    Raises:
        ValueError: naming the key of the text and the model that cannot read it.
    """
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "longest"):
        return
    readings = [*_items(module, data, stage), *_written(module, data, stage)]
    for role, spec in (("student", module.student_spec), ("teacher", module.teacher_spec)):
        if spec is None:
            continue
        config = load_config(spec, f"model.{role}").get_text_config(decoder=True)
        reads = getattr(config, "max_position_embeddings", None)
        for reading in readings:
            if reads and reading.tokens > reads:
                raise ValueError(
                    f"{reading.key}: {reading.what} of {reading.tokens} tokens, and model.{role} reads {reads}. Make it smaller; "
                    "data.init_args.overlong: truncate cuts what is longer."
                )


def check_tokens(module: DistillationModule) -> None:
    """Look for tokens that the student has and the teacher lacks.

    Args:
        module: its data module may find them (``check_token_ids``); otherwise nothing is looked at.

    Raises:
        ValueError: naming split, item and token.
    """
    check = getattr(module.trainer.datamodule, "check_token_ids", None)  # type: ignore[attr-defined]
    teacher = module.teacher_spec
    if check is not None and teacher is not None and not teacher.shared_with_student:
        check(shared_ids(module.tokenizer, load_tokenizer(teacher, "model.teacher")))


def _items(module: DistillationModule, data: Any, stage: str) -> Iterator[Reading]:
    for split in SPLITS[stage]:
        yield Reading("data.init_args.max_length", data.longest(split)[1], f"the split {split} has an item")
    if stage == "fit" and getattr(data, "corpus", None) is not None and len(module.corpus_objectives):
        yield Reading("data.init_args.corpus.length", data.corpus.length, "the corpus has rows")


def _written(module: DistillationModule, data: Any, stage: str) -> Iterator[Reading]:
    """Prompts with the longest responses that source, callbacks or `predict` may give."""
    writers: list[tuple[str, Any, str]] = []
    if stage == "fit" and hasattr(module.source, "decoding"):
        writers.append(("model.source.init_args", module.source.decoding, "train"))
    if stage == "predict":
        writers.append(("model.prediction", module.prediction, "predict"))
    else:
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            takes_part = getattr(callback, "max_prompts", 0) and (stage != "fit" or callback.every_n_validations)
            if takes_part and hasattr(callback, "decoding"):
                name = type(callback).__name__
                writers.append((KEYS.get(name, name), callback.decoding, SPLITS[stage][-1]))
    for key, decoding, split in writers:
        prompt, new = data.longest(split)[0], decoding.max_new_tokens
        if prompt:
            yield Reading(f"{key}.max_new_tokens", prompt + new, f"{new} after a prompt of {prompt} are a text")
