"""Incremental decoding of one model with its KV cache, catching up on tokens that another model sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.functional import entropy
from lit_distill.generation.sampling import token_logprobs
from lit_distill.models.caching import caching_of, keep_rows, read_whole
from lit_distill.models.fixed_passes import FixedPasses, padded_columns
from lit_distill.models.kv_cache import new_cache
from lit_distill.models.lm_head import chunk_rows_for

if TYPE_CHECKING:
    from lit_distill.generation.base import DecodableModel
    from lit_distill.generation.decoding_batch import DecodingBatch
    from lit_distill.models.replay import Capture

LARGEST_REPLAY = 16
"""Most tokens of a captured pass. A model that has to catch up on more, or on its prompt, runs as usual."""


class CachedDecoder:
    """One model, its KV cache, and the rows that are still decoded.

    The model runs only when it has to sample a token and at the end of generation. It then processes all tokens that are not in
    its cache yet in one forward pass (a recurrent model: token by token). So it processes each token once, whichever model
    sampled it. A model without a working cache processes the whole sequence each time.

    With ``capture``, the whole step (forward pass, head, sampling, records) is captured for 1, 2, 4, 8 and 16 new
    tokens, and replayed from the second time on. A pass over a number in between reads some earlier tokens again.

    Args:
        model: student or teacher.
        batch: the responses; the tokens that this model samples are written into it.
        measure_entropy: record the entropy of the distribution of each response token.
        keep_hidden: record the hidden state that predicts each response token.
        capture: makes steps replayable; None runs all of them.
    """

    def __init__(
        self,
        model: DecodableModel,
        batch: DecodingBatch,
        measure_entropy: bool = False,
        keep_hidden: bool = False,
        capture: Capture | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.temperature = batch.sampling.temperature or 1.0  # greedy: the log-probabilities are those at temperature 1
        self.head = model.decoding_head()
        self.caching = caching_of(model, batch.ids.device)
        self.prompt_width = batch.prompts.input_ids.shape[1]
        response_mask = batch.prompts.attention_mask.new_ones(batch.ids.shape)
        self.mask = torch.cat([batch.prompts.attention_mask, response_mask], dim=-1)
        """[b, P + T] attention mask of the rows that are still decoded."""
        self.capture = capture
        columns = self.mask.shape[1] if capture is None else padded_columns(self.mask.shape[1])
        self.cache = new_cache(model.config, columns) if self.caching.works else None
        self.passes: FixedPasses | None = None
        """The captured passes of ``rows``; None before the first."""
        self.rows = torch.arange(len(batch.prompts), device=batch.ids.device)
        """[b] indices of the rows that are still decoded."""
        self.num_cached = -1
        """How many response tokens are in the cache; -1 before the prompt is processed."""
        self.logprobs = torch.zeros(batch.ids.shape, dtype=torch.float32, device=batch.ids.device)
        """[B, T] log-probability of every token scored so far."""
        self.entropies = torch.zeros_like(self.logprobs) if measure_entropy else None
        """[B, T] entropy of the distribution of every token scored so far, if it is measured."""
        self.keep_hidden = keep_hidden
        self.hidden: Tensor | None = None
        """[B, T, H] the hidden state that predicts each token, if they are kept."""

    def advance(self, step: int) -> None:
        """Sample token ``step`` of the rows that are still decoded, and record what was not recorded of the tokens before it."""
        self.batch.step.fill_(step)
        new = step - self.num_cached
        size = 1 << (new - 1).bit_length()
        if self.capture is None or self.num_cached < 0 or size > min(step, LARGEST_REPLAY):
            self._sample(self._forward_new_tokens(step))
            return
        if self.passes is None:
            assert self.cache is not None
            self.passes = FixedPasses(self.model, self.cache, self.mask, self.capture)
        self.passes.run(self.prompt_width + step, size, self._replayable_step)
        self.num_cached = step

    def finish(self, length: int) -> None:
        """Record the log-probabilities of the remaining tokens, up to ``length``; the last token itself is never an input."""
        if length - 1 > self.num_cached:
            self.batch.step.fill_(length - 1)
            hidden = self._forward_new_tokens(length - 1)
            columns = self._columns(hidden)
            self._store(hidden, columns)
            self._score(hidden, columns)

    def drop_finished(self, at_least_one: bool = False) -> None:
        """Stop decoding the rows that had ended when it was last looked. Call it after an `advance` to that step or a later one.

        Steps are captured for a number of rows: if they are, rows are dropped once half of them have ended.

        Args:
            at_least_one: keep one row even if all have ended, because other ranks still need this rank's forward passes.
        """
        left = max(len(self.batch.remaining), int(at_least_one))
        if left == len(self.rows) or (self.capture is not None and 2 * left > len(self.rows)):
            return
        # both are in ascending order, so this needs no wait; 0 if the one row is kept for other ranks
        here = (
            torch.searchsorted(self.rows, self.batch.remaining)
            if len(self.batch.remaining)
            else self.rows.new_zeros(left)
        )
        self.rows, self.mask, self.passes = self.rows[here], self.mask[here], None
        if self.cache is not None:
            keep_rows(self.cache, here)

    def _sample(self, hidden: Tensor) -> None:
        """Sample the token after the last of ``hidden`` ``[b, s, H]``, which predicts the last s tokens, and record all of them."""
        columns = self._columns(hidden)
        self._store(hidden, columns)
        if len(columns) > 1:
            self._score(hidden[:, :-1], columns[:-1])
        logits = self._logits(hidden[:, -1])
        tokens, logprobs = self.batch.sample(self.rows, logits)
        self.logprobs[self.rows, self.batch.step] = logprobs
        if self.entropies is not None:
            self.entropies[self.rows, self.batch.step] = entropy(logits)
        self.batch.append(self.rows, tokens)

    def _replayable_step(self, size: int) -> None:
        """`advance` over ``size`` new tokens, with no shape and no number that depends on the step."""
        assert self.passes is not None
        columns = self.batch.step + torch.arange(-size, 0, device=self.rows.device)
        tokens = self.batch.ids[self.rows[:, None], columns]
        self._sample(self.passes.hidden(tokens, self.prompt_width + columns))

    def _columns(self, hidden: Tensor) -> Tensor:
        """The response columns ``[s]`` that ``hidden`` ``[b, s, H]`` predicts, up to the current step."""
        return self.batch.step + torch.arange(1 - hidden.shape[1], 1, device=hidden.device)

    def _forward_new_tokens(self, upto: int) -> Tensor:
        """Hidden states ``[b, s, H]`` that predict the last ``s`` tokens up to and including token ``upto``."""
        width = self.prompt_width + upto
        if self.cache is None:
            hidden = read_whole(self.model, self._text(0, upto), self.mask[:, :width])
        else:
            first = self.prompt_width + self.num_cached if self.num_cached >= 0 else 0
            text = self._text(first, upto)
            step = 1 if first and self.caching.one_by_one else width
            parts = [
                self.model(text[:, i - first : i - first + step], self.mask[:, : min(i + step, width)], self.cache)
                for i in range(first, width, step)
            ]
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        hidden = hidden[:, -(upto - self.num_cached) :]
        self.num_cached = upto
        return hidden

    def _text(self, first: int, upto: int) -> Tensor:
        """The tokens from column ``first`` of prompt and response, up to and including response token ``upto - 1``."""
        responses = self.batch.ids[self.rows, max(0, first - self.prompt_width) : upto]
        if first >= self.prompt_width:
            return responses
        return torch.cat([self.batch.prompts.input_ids[self.rows, first:], responses], dim=-1)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.head.logits(hidden)
        return logits if self.temperature == 1 else logits / self.temperature

    def _store(self, hidden: Tensor, columns: Tensor) -> None:
        if not self.keep_hidden:
            return
        if self.hidden is None:
            self.hidden = hidden.new_zeros(*self.batch.ids.shape, hidden.shape[-1])
        self.hidden[self.rows[:, None], columns] = hidden

    def _score(self, hidden: Tensor, columns: Tensor) -> None:
        """Record the log-probabilities of tokens ``columns`` ``[s]``, which ``hidden`` ``[b, s, H]`` predicts, a few at a time."""
        rows = self.rows[:, None]
        width = max(1, chunk_rows_for(self.head) // max(1, len(rows)))
        for part, at in zip(hidden.split(width, dim=1), columns.split(width), strict=True):
            logits = self._logits(part.flatten(0, 1))
            tokens = self.batch.ids[rows, at]
            self.logprobs[rows, at] = token_logprobs(logits, tokens.flatten()).view(tokens.shape)
            if self.entropies is not None:
                self.entropies[rows, at] = entropy(logits).view(tokens.shape)
