"""Checks prompt and response lengths against the models' context length, and token ids against the teacher's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_distill.models import load_tokenizer, shared_ids
from lit_distill.models.spec import load_config

if TYPE_CHECKING:
    from lit_distill.validation.run import DistillationRun

SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}
KEYS = {
    "GenerationEvaluator": "generation",
    "ExposureBiasMonitor": "exposure_bias",
    "OnPolicyEvaluator": "on_policy",
}


class LengthRequirement(NamedTuple):
    """A text that the models have to process."""

    key: str
    """The YAML key that decides its length."""
    tokens: int
    what: str
    """What the text is, for the message."""


def check_lengths(run: DistillationRun, stage: str) -> None:
    """Compare the longest items, and the longest prompts plus responses, with the context length of student and teacher.

    Args:
        run: the run; nothing is compared if its data module has no method ``longest``.
        stage: fit, validate, test or predict.

    Raises:
        ValueError: with the key of the text, and the model whose context is too short.
    """
    data: Any = run.trainer.datamodule
    if not hasattr(data, "longest"):
        return
    requirements = [*_items(run, data, stage), *_generated(run, data, stage)]
    for role, spec in run.model_specs.items():
        config = load_config(spec, f"model.{role}").get_text_config(decoder=True)
        context_length = getattr(config, "max_position_embeddings", None)
        for required in requirements:
            if context_length and required.tokens > context_length:
                raise ValueError(
                    f"{required.key}: {required.what} of {required.tokens} tokens, but the context length of model.{role} is "
                    f"{context_length}. Make it smaller; data.init_args.overlong: truncate cuts longer items."
                )


def check_tokens(run: DistillationRun) -> None:
    """Refuse data with tokens of the student that the teacher lacks.

    Args:
        run: the run; nothing is checked if its data module has no method ``check_token_ids``.

    Raises:
        ValueError: with split, item and token.
    """
    check = getattr(run.trainer.datamodule, "check_token_ids", None)
    if check is None:
        return
    for key, spec in run.model_specs.items():
        if key != "student" and not spec.shared_with_student:
            check(shared_ids(run.tokenizer, load_tokenizer(spec, key)))


def answers_prompts(callback: Any, stage: str) -> bool:
    """Whether a callback lets models answer prompts in a stage, as those with ``max_prompts`` do unless they are off."""
    is_due = stage != "fit" or getattr(callback, "every_n_validations", None) is not None
    return is_due and bool(getattr(callback, "max_prompts", 0))


def _items(run: DistillationRun, data: Any, stage: str) -> Iterator[LengthRequirement]:
    for split in SPLITS[stage]:
        yield LengthRequirement("data.init_args.max_length", data.longest(split)[1], f"the split {split} has an item")
    if stage == "fit" and getattr(data, "corpus", None) is not None and len(run.corpus_objectives):
        yield LengthRequirement("data.init_args.corpus.length", data.corpus.length, "the corpus has rows")


def _generated(run: DistillationRun, data: Any, stage: str) -> Iterator[LengthRequirement]:
    """The longest prompts plus the longest responses that source, callbacks or `predict` may generate."""
    generators: list[tuple[str, Any, str]] = []
    if stage == "fit" and hasattr(run.source, "sampling"):
        generators.append(("model.source.init_args", run.source.sampling, "train"))
    if stage == "predict":
        generators.append(("model.prediction", run.prediction, "predict"))
    else:
        for callback in run.trainer.callbacks:
            if answers_prompts(callback, stage) and hasattr(callback, "sampling"):
                name = type(callback).__name__
                generators.append((KEYS.get(name, name), callback.sampling, SPLITS[stage][-1]))
    for key, sampling, split in generators:
        prompt, new = data.longest(split)[0], sampling.max_new_tokens
        if prompt:
            yield LengthRequirement(
                f"{key}.max_new_tokens",
                prompt + new,
                f"a prompt of {prompt} and a response of {new} tokens make a text",
            )
