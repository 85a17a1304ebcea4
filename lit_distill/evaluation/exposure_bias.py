"""KL divergence of student and teacher at each step of responses that the student or the teacher generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_distill.functional import ExposureBias, exposure_bias, forward_kl
from lit_distill.models.lm_head import chunk_rows_for
from lit_distill.types import join_prompts

if TYPE_CHECKING:
    from lit_distill.models import CausalLM
    from lit_distill.teachers import FrozenTeacher
    from lit_distill.types import Prompts, Responses, Sequences

GENERATORS = ("student", "teacher")
STEP = "step"


def written_text(prompts: Prompts, responses: Responses) -> Sequences:
    """Prompts ``[B, P]`` and responses ``[B, T]``, concatenated; the signal ``step`` counts the response tokens from 0."""
    steps = torch.arange(responses.mask.shape[1], device=responses.mask.device, dtype=torch.float32)
    return join_prompts(prompts, responses, {STEP: steps.expand(responses.mask.shape)})


@torch.no_grad()
def step_errors(student: CausalLM, teacher: FrozenTeacher, text: Sequences, chunk_rows: int | None = None) -> Tensor:
    """``[N]`` nats: e_t = KL(teacher || student) of the next token at each of the N targets, a chunk of rows at a time."""
    heads = student.decoding_head(), teacher.decoding_head()
    rows = student.target_rows(text), teacher.target_rows(text)
    size = chunk_rows or chunk_rows_for(heads[0])
    errors = rows[0].new_zeros(len(rows[0]), dtype=torch.float32)
    for start in range(0, len(errors), size):
        part = slice(start, start + size)
        errors[part] = forward_kl(heads[0].logits(rows[0][part]), heads[1].logits(rows[1][part]))
    return errors


class AccumulatedErrors(NamedTuple):
    """The result of `StepKLMetric` over all texts of both generators."""

    curves: ExposureBias
    """``[T]`` each."""
    longest: int
    """Tokens of the longest text; all curves are constant beyond it."""
    num_texts: int
    """Number of texts that the student generated; the teacher generated the same number."""


class StepKLMetric(Metric):
    r"""Mean e_t at each step t over the texts of each generator, exact over batches and ranks.

    A text that ends before step t counts with e_t = 0, because both models agree that nothing follows. So the sum of the means
    up to step l is an unbiased estimate of an expectation over complete texts: for texts of the teacher it is KL(p‖q) of the
    distributions of the first l tokens, by the chain rule. A mean over only the texts that are still running at t would be
    conditioned on that, differently for each generator, so that R(l) and l·ε(l) would be about different prompts.

    Args:
        length: T, the maximum number of tokens of a text.
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

    def update(self, generator: str, errors: Tensor, steps: Tensor, num_texts: int) -> None:
        """Add texts of one generator.

        Args:
            generator: the model that generated them, "student" or "teacher".
            errors: ``[N]`` nats, e_t at each of their tokens.
            steps: ``[N]`` index t of each token in its text, from 0.
            num_texts: number of texts, including those without tokens.
        """
        row, at = GENERATORS.index(generator), steps.long()
        self.sums[row].index_add_(0, at, errors.double())
        self.tokens[row].index_add_(0, at, torch.ones_like(errors, dtype=torch.float64))
        self.texts[row] += num_texts

    def compute(self) -> AccumulatedErrors | None:
        """The curves; None if a generator has no texts."""
        if not bool((self.texts > 0).all()):
            return None
        student, teacher = self.sums / self.texts[:, None]
        longest = int((self.tokens.sum(dim=0) > 0).sum())
        return AccumulatedErrors(exposure_bias(student, teacher), longest, int(self.texts[0]))
