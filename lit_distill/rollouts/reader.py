"""A model that reads along while a text is being written, and says what it would write next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lit_distill.functional import entropy
from lit_distill.models.caching import caching_of, keep_rows, read_whole
from lit_distill.models.chunked_head import chunk_rows_for

if TYPE_CHECKING:
    from lit_distill.models import CausalLM, FrozenTeacher
    from lit_distill.types import Prompts


class Reader:
    """One model, its key-value cache, and the rows it still reads.

    It reads a token only when it has to speak or when the text is finished, then all it has missed in one forward (a recurrent
    model: token by token): its body passes over each token once in all, whoever writes. A model without a cache that works reads
    the whole text each time.

    Args:
        speaker: the model.
        prompts: ``[B, P]``, padded on the left.
        ids: ``[B, T]`` the responses, written by whoever holds this buffer.
        temperature: of the distribution to draw from and to score by; 0 scores at 1.
        measure_entropy: record the entropy of the distribution of each response token.
        keep_hidden: record the hidden row that predicts each response token.
    """

    def __init__(
        self,
        speaker: CausalLM | FrozenTeacher,
        prompts: Prompts,
        ids: Tensor,
        temperature: float,
        measure_entropy: bool = False,
        keep_hidden: bool = False,
    ) -> None:
        self.speaker = speaker
        self.prompts = prompts
        self.ids = ids
        self.temperature = temperature or 1.0
        self.head = speaker.decoding_head()
        self.caching = caching_of(speaker, ids.device)
        self.cache = DynamicCache(config=speaker.config) if self.caching.works else None
        self.rows = torch.arange(len(prompts), device=ids.device)
        """[b] which rows of the batch are still read."""
        self.looked_at = -1
        """The step at which finished rows were last looked for."""
        self.num_read = -1
        """How many response tokens have been read; -1 before the prompt."""
        self.logprobs = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        """[B, T] log-probability of every token scored so far."""
        self.measure_entropy = measure_entropy
        self.entropies = torch.zeros_like(self.logprobs)
        """[B, T] entropy of the distribution of every token scored so far, where it is measured."""
        self.keep_hidden = keep_hidden
        self.hidden: Tensor | None = None
        """[B, T, H] the row that predicts each token, where they are kept."""

    def next_logits(self, step: int) -> Tensor:
        """Logits ``[b, V]`` of token ``step`` for the rows still read, at the temperature; scores what was missed on the way."""
        hidden = self._read(step)
        if hidden.shape[1] > 1:
            self._score(hidden[:, :-1], step - hidden.shape[1] + 1)
        return self.head.logits(hidden[:, -1]) / self.temperature

    def record(self, step: int, logits: Tensor, tokens: Tensor) -> None:
        """Keep the log-probability of the ``[b]`` tokens that were drawn from ``logits``."""
        self.logprobs[self.rows, step] = _logprobs(logits, tokens)
        if self.measure_entropy:
            self.entropies[self.rows, step] = entropy(logits)

    def finish(self, length: int) -> None:
        """Score the rest of texts that are ``length`` tokens long; the last token itself is never read."""
        if length - 1 > self.num_read:
            hidden = self._read(length - 1)
            self._score(hidden, length - hidden.shape[1])

    def keep(self, alive: Tensor, step: int, at_least_one: bool = False) -> None:
        """Stop reading rows that have ended by ``step``. Call it right after `next_logits`.

        Args:
            alive: ``[B]`` bool.
            step: of the last token written.
            at_least_one: read on with one row that has ended, since other ranks wait for this one.
        """
        self.looked_at = step
        here = alive[self.rows].nonzero()[:, 0]
        if at_least_one and len(here) == 0:
            here = here.new_zeros(1)
        if len(here) < len(self.rows):
            self.rows = self.rows[here]
            if self.cache is not None:
                keep_rows(self.cache, here)

    def _read(self, upto: int) -> Tensor:
        """Hidden rows ``[b, s, H]`` that predict the ``s`` tokens before and including token ``upto``."""
        prompt_mask = self.prompts.attention_mask[self.rows]
        mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(self.rows), upto)], dim=-1)
        text = torch.cat([self.prompts.input_ids[self.rows], self.ids[self.rows, :upto]], dim=-1)
        width = text.shape[1]
        if self.cache is None:
            hidden = read_whole(self.speaker, text, mask)
        else:
            first = width - upto + self.num_read if self.num_read >= 0 else 0
            step = 1 if first and self.caching.one_by_one else width
            starts = range(first, width, step)
            parts = [self.speaker(text[:, i : i + step], mask[:, : i + step], self.cache) for i in starts]
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        hidden = hidden[:, -(upto - self.num_read) :]
        self.num_read = upto
        if self.keep_hidden:
            self._store(hidden, upto - hidden.shape[1] + 1)
        return hidden

    def _store(self, hidden: Tensor, first: int) -> None:
        if self.hidden is None:
            self.hidden = hidden.new_zeros(*self.ids.shape, hidden.shape[-1])
        self.hidden[self.rows, first : first + hidden.shape[1]] = hidden

    def _score(self, hidden: Tensor, first: int) -> None:
        """Record the log-probabilities of tokens ``first``, … that ``hidden`` ``[b, s, H]`` predicts, a few columns at a time."""
        width = max(1, chunk_rows_for(self.head) // max(1, len(self.rows)))
        for start in range(0, hidden.shape[1], width):
            part = hidden[:, start : start + width]
            columns = slice(first + start, first + start + part.shape[1])
            logits = self.head.logits(part.flatten(0, 1)) / self.temperature
            tokens = self.ids[self.rows, columns]
            self.logprobs[self.rows, columns] = _logprobs(logits, tokens.flatten()).view(tokens.shape)
            if self.measure_entropy:
                self.entropies[self.rows, columns] = entropy(logits).view(tokens.shape)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
