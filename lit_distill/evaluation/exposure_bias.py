"""How far student and teacher are apart, token by token, along texts that either of them wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lit_distill.functional import ExposureBias, exposure_bias, forward_kl
from lit_distill.models.chunked_head import chunk_rows_for
from lit_distill.types import Sequences

if TYPE_CHECKING:
    from lit_distill.models import CausalLM, FrozenTeacher
    from lit_distill.rollouts import Responses
    from lit_distill.types import Prompts

WRITERS = ("student", "teacher")
STEP = "step"


def written_text(prompts: Prompts, responses: Responses) -> Sequences:
    """Prompts ``[B, P]`` and responses ``[B, T]`` as one text; its signal ``step`` counts a response's tokens from 0."""
    width, mask = prompts.input_ids.shape[1], responses.mask
    steps = torch.arange(mask.shape[1], device=mask.device, dtype=torch.float32).expand(mask.shape)
    return Sequences(
        input_ids=torch.cat([prompts.input_ids, responses.ids], dim=-1),
        attention_mask=torch.cat([prompts.attention_mask, mask.long()], dim=-1),
        target_mask=F.pad(mask, (width, 0)),
        signals={STEP: F.pad(steps, (width, 0))},
    )


@torch.no_grad()
def step_errors(student: CausalLM, teacher: FrozenTeacher, text: Sequences, chunk_rows: int | None = None) -> Tensor:
    """``[N]`` nats: e_t = KL(teacher || student) of the next token at each of the text's N targets, some rows at a time."""
    heads = student.decoding_head(), teacher.decoding_head()
    rows = student.target_rows(text), teacher.target_rows(text)
    size = chunk_rows or chunk_rows_for(heads[0])
    errors = rows[0].new_zeros(len(rows[0]), dtype=torch.float32)
    for start in range(0, len(errors), size):
        part = slice(start, start + size)
        errors[part] = forward_kl(heads[0].logits(rows[0][part]), heads[1].logits(rows[1][part]))
    return errors


class AccumulatedErrors(NamedTuple):
    """What was found over all texts of both writers."""

    curves: ExposureBias
    """[T] each."""
    longest: int
    """Tokens of the longest text; all curves are flat beyond it."""
    num_texts: int
    """How many texts the student wrote; the teacher wrote as many."""


class StepErrors(Metric):
    r"""Mean e_t at each step t over the texts of each writer, exact over batches and ranks.

    A text that has ended before t counts with e_t = 0, as one on which both models agree to say nothing more. So the sum to
    l is an unbiased estimate of what the texts' laws define: over texts of the teacher it is KL(p‖q) between the laws of
    the first l tokens, by the chain rule. A mean over the texts still alive at t would be conditioned on surviving, under
    another law for each writer, so that R(l) and l·ε(l) would speak of different prompts.

    Args:
        length: T, the largest number of tokens of a text.
    """

    full_state_update = False
    sums: Tensor
    tokens: Tensor
    texts: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, length, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(2, length, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("texts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, writer: str, errors: Tensor, steps: Tensor, num_texts: int) -> None:
        """Add texts of one writer.

        Args:
            writer: who wrote them, student or teacher.
            errors: ``[N]`` nats at their tokens.
            steps: ``[N]`` which token of its text each is, from 0.
            num_texts: how many texts they are of, those without a token included.
        """
        row, at = WRITERS.index(writer), steps.long()
        self.sums[row].index_add_(0, at, errors.double())
        self.tokens[row].index_add_(0, at, torch.ones_like(errors, dtype=torch.float64))
        self.texts[row] += num_texts

    def compute(self) -> AccumulatedErrors | None:
        """The curves; None where a writer has no text."""
        if not bool((self.texts > 0).all()):
            return None
        student, teacher = self.sums / self.texts[:, None]
        longest = int((self.tokens.sum(dim=0) > 0).sum())
        return AccumulatedErrors(exposure_bias(student, teacher), longest, int(self.texts[0]))
