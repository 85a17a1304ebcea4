"""Incremental decoding of one model with its KV cache, catching up on tokens that another model sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.functional import entropy
from lit_distill.generation.sampling import token_logprobs
from lit_distill.models.caching import caching_of, keep_rows, read_whole
from lit_distill.models.kv_cache import new_cache
from lit_distill.models.lm_head import chunk_rows_for

if TYPE_CHECKING:
    from lit_distill.generation.base import DecodableModel
    from lit_distill.types import Prompts


class CachedDecoder:
    """One model, its KV cache, and the rows that are still decoded.

    The model runs only when it has to sample a token and at the end of generation. It then processes all tokens that are not in
    its cache yet in one forward pass (a recurrent model: token by token). So it processes each token once, whichever model
    sampled it. A model without a working cache processes the whole sequence each time.

    Args:
        model: student or teacher.
        prompts: ``[B, P]``, padded on the left.
        ids: ``[B, T]`` the responses; the caller writes the sampled tokens into this buffer.
        temperature: of the distribution for sampling and log-probabilities; at 0, log-probabilities are taken at 1.
        measure_entropy: record the entropy of the distribution of each response token.
        keep_hidden: record the hidden state that predicts each response token.
    """

    def __init__(
        self,
        model: DecodableModel,
        prompts: Prompts,
        ids: Tensor,
        temperature: float,
        measure_entropy: bool = False,
        keep_hidden: bool = False,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.ids = ids
        self.temperature = temperature or 1.0
        self.head = model.decoding_head()
        self.caching = caching_of(model, ids.device)
        response_mask = prompts.attention_mask.new_ones(ids.shape)
        self.mask = torch.cat([prompts.attention_mask, response_mask], dim=-1)
        """[b, P + T] attention mask of the rows that are still decoded."""
        self.cache = new_cache(model.config, self.mask.shape[1]) if self.caching.works else None
        self.rows = torch.arange(len(prompts), device=ids.device)
        """[b] indices of the rows that are still decoded."""
        self.last_compaction = -1
        """The step at which finished rows were last dropped."""
        self.num_cached = -1
        """How many response tokens are in the cache; -1 before the prompt is processed."""
        self.logprobs = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        """[B, T] log-probability of every token scored so far."""
        self.entropies = torch.zeros_like(self.logprobs) if measure_entropy else None
        """[B, T] entropy of the distribution of every token scored so far, if it is measured."""
        self.keep_hidden = keep_hidden
        self.hidden: Tensor | None = None
        """[B, T, H] the hidden state that predicts each token, if they are kept."""

    def next_logits(self, step: int) -> Tensor:
        """Logits ``[b, V]`` of token ``step`` of the active rows, divided by the temperature.

        Also records the log-probabilities of the tokens that were not in the cache yet.
        """
        hidden = self._forward_new_tokens(step)
        if hidden.shape[1] > 1:
            self._score(hidden[:, :-1], step - hidden.shape[1] + 1)
        return self._logits(hidden[:, -1])

    def append(self, step: int, logits: Tensor, logprobs: Tensor) -> None:
        """Record the log-probabilities ``[b]`` of the tokens that were sampled from ``logits``."""
        self.logprobs[self.rows, step] = logprobs
        if self.entropies is not None:
            self.entropies[self.rows, step] = entropy(logits)

    def finish(self, length: int) -> None:
        """Record the log-probabilities of the remaining tokens, up to ``length``; the last token itself is never an input."""
        if length - 1 > self.num_cached:
            hidden = self._forward_new_tokens(length - 1)
            self._score(hidden, length - hidden.shape[1])

    def drop_finished(self, active: Tensor, step: int, at_least_one: bool = False) -> None:
        """Stop decoding rows that have ended by ``step``. Call it right after `next_logits`.

        Args:
            active: ``[B]`` bool.
            step: of the last token written.
            at_least_one: keep one row even if all have ended, because other ranks still need this rank's forward passes.
        """
        self.last_compaction = step
        here = active[self.rows].nonzero()[:, 0]
        if at_least_one and len(here) == 0:
            here = here.new_zeros(1)
        if len(here) < len(self.rows):
            self.rows, self.mask = self.rows[here], self.mask[here]
            if self.cache is not None:
                keep_rows(self.cache, here)

    def _forward_new_tokens(self, upto: int) -> Tensor:
        """Hidden states ``[b, s, H]`` that predict the last ``s`` tokens up to and including token ``upto``."""
        prompt_width = self.prompts.input_ids.shape[1]
        width = prompt_width + upto
        if self.cache is None:
            hidden = read_whole(self.model, self._text(0, upto), self.mask[:, :width])
        else:
            first = prompt_width + self.num_cached if self.num_cached >= 0 else 0
            text = self._text(first, upto)
            step = 1 if first and self.caching.one_by_one else width
            parts = [
                self.model(text[:, i - first : i - first + step], self.mask[:, : min(i + step, width)], self.cache)
                for i in range(first, width, step)
            ]
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        hidden = hidden[:, -(upto - self.num_cached) :]
        self.num_cached = upto
        if self.keep_hidden:
            self._store(hidden, upto - hidden.shape[1] + 1)
        return hidden

    def _text(self, first: int, upto: int) -> Tensor:
        """The tokens from column ``first`` of prompt and response, up to and including response token ``upto - 1``."""
        prompt_width = self.prompts.input_ids.shape[1]
        if first >= prompt_width:
            return self.ids[self.rows, first - prompt_width : upto]
        return torch.cat([self.prompts.input_ids[self.rows, first:], self.ids[self.rows, :upto]], dim=-1)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.head.logits(hidden)
        return logits if self.temperature == 1 else logits / self.temperature

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
            logits = self._logits(part.flatten(0, 1))
            tokens = self.ids[self.rows, columns]
            self.logprobs[self.rows, columns] = token_logprobs(logits, tokens.flatten()).view(tokens.shape)
            if self.entropies is not None:
                self.entropies[self.rows, columns] = entropy(logits).view(tokens.shape)
