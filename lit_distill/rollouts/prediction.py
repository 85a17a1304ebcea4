"""What `lit-distill predict` writes: responses of the student, or of the teacher to make SeqKD data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_distill.data.special_tokens import adds_special_tokens
from lit_distill.rollouts.decoding import Decoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_distill.rollouts.loop import Responses
    from lit_distill.types import Batch


@dataclass
class Prediction(Decoding):
    """Who speaks in `predict`, how, and where it is written."""

    speaker: Literal["student", "teacher"] = "student"
    """Whose responses."""
    path: str = "predictions.jsonl"
    """JSONL file of id, speaker, prompt (as the model reads it), response, finished (whether it ended by itself), decoding,
    references and what it takes to read the same ids again. An existing file is continued."""
    logprobs: bool = False
    """Also write the tokens and their log-probabilities (at the temperature, or 1 if greedy; before truncation)."""
    seed: int = 0
    """Of the draws at temperature > 0; together with an item's id it fixes the response."""

    def drawn_by(self) -> dict[str, float]:
        """What the responses depend on, besides speaker and prompt."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        return {name: getattr(self, name) for name in names}


def prediction_records(
    batch: Batch,
    responses: Responses,
    texts: Sequence[str],
    stop_ids: Sequence[int],
    settings: Prediction,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """One record per item: id, speaker, prompt, response, finished, decoding, references; tokens and log-probabilities on request.

    ``add_special_tokens`` (whether the tokenizer put BOS before the prompt's text) and ``stop_token`` (which token ended the
    response) let training on the records read the same ids.

    Args:
        batch: what was asked.
        responses: ``[B, T]`` what was answered.
        texts: the same as text.
        stop_ids: the tokens that end a response.
        settings: who spoke, and whether to add tokens and log-probabilities.
        tokenizer: of the prompts and responses.
    """
    assert batch.prompts is not None
    prompt_rows = zip(batch.prompts.input_ids.tolist(), batch.prompts.attention_mask.tolist(), strict=True)
    prompts = [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in prompt_rows]
    lengths = responses.mask.sum(dim=-1).tolist()
    accepted = batch.references or ((),) * len(batch)
    records: list[dict[str, Any]] = [
        {
            "id": item,
            "speaker": settings.speaker,
            "prompt": prompt,
            "add_special_tokens": adds_special_tokens(tokenizer, prompt, prompt_ids),
            "response": text,
            "finished": finished,
            "stop_token": tokenizer.convert_ids_to_tokens(row[length - 1]) if finished else None,
            "decoding": settings.drawn_by(),
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
            accepted,
            strict=True,
        )
    ]
    if settings.logprobs:
        rows = zip(records, responses.ids.cpu(), responses.logprobs.cpu(), responses.mask.cpu(), strict=True)
        for record, ids, values, mask in rows:
            record |= {"tokens": ids[mask].tolist(), "logprobs": values[mask].tolist()}
    return records
