"""Settings and output records of `lit-distill predict`: responses of the student, or of the teacher as SeqKD data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_distill.data.special_tokens import adds_special_tokens
from lit_distill.generation.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_distill.types import Batch, Responses


@dataclass
class Prediction(SamplingParams):
    """Which model generates in `predict`, with which sampling parameters, and where the responses are written."""

    model: Literal["student", "teacher"] = "student"
    """The model that generates."""
    path: str = "predictions.jsonl"
    """JSONL file with id, model, weights (a digest of them), prompt (as given to the model), response, finished (whether it ended
    with a stop token), decoding (sampling parameters), references, and the tokenizer settings to get the same ids again. If the
    file exists, records are appended."""
    logprobs: bool = False
    """Also write the tokens and their log-probabilities (at the temperature, or 1 if greedy; before truncation)."""
    seed: int = 0
    """Seed for temperature > 0. Together with the id of an item it determines the response."""
    speaker: Literal["student", "teacher"] | None = None
    """Deprecated name of ``model``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.speaker is not None:
            warnings.warn("model.prediction.speaker is now model.prediction.model.", FutureWarning, stacklevel=2)
            self.model, self.speaker = self.speaker, None

    def sampling_settings(self) -> dict[str, float]:
        """The sampling parameters that a response depends on, besides model and prompt."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        return {name: getattr(self, name) for name in names}


def prediction_records(
    batch: Batch,
    responses: Responses,
    texts: Sequence[str],
    stop_ids: Sequence[int],
    settings: Prediction,
    tokenizer: PreTrainedTokenizerBase,
    weights: str,
) -> list[dict[str, Any]]:
    """One record per item: id, model, weights, prompt, response, finished, decoding, references; on request tokens and logprobs.

    ``add_special_tokens`` (whether the tokenizer put BOS before the prompt) and ``stop_token`` (which token ended the response)
    are stored so that training on the records uses the same ids.

    Args:
        batch: the prompts.
        responses: ``[B, T]`` to the prompts.
        texts: the responses as strings.
        stop_ids: the tokens that end a response.
        settings: which model generated, and whether to add tokens and log-probabilities.
        tokenizer: of the prompts and responses.
        weights: a digest of the model's weights.
    """
    assert batch.prompts is not None
    prompt_rows = zip(batch.prompts.input_ids.tolist(), batch.prompts.attention_mask.tolist(), strict=True)
    prompts = [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in prompt_rows]
    lengths = responses.mask.sum(dim=-1).tolist()
    records: list[dict[str, Any]] = [
        {
            "id": item,
            "model": settings.model,
            "weights": weights,
            "prompt": prompt,
            "add_special_tokens": adds_special_tokens(tokenizer, prompt, prompt_ids),
            "response": text,
            "finished": finished,
            "stop_token": tokenizer.convert_ids_to_tokens(row[length - 1]) if finished else None,
            "decoding": settings.sampling_settings(),
            "references": list(references),
        }
        for item, prompt, prompt_ids, text, row, length, finished, references in zip(
            batch.ids,
            batch.prompt_texts,
            prompts,
            texts,
            responses.ids.tolist(),
            lengths,
            responses.finished(stop_ids).tolist(),
            batch.accepted,
            strict=True,
        )
    ]
    if settings.logprobs:
        rows = zip(records, responses.ids.cpu(), responses.logprobs.cpu(), responses.mask.cpu(), strict=True)
        for record, ids, values, mask in rows:
            record |= {"tokens": ids[mask].tolist(), "logprobs": values[mask].tolist()}
    return records
