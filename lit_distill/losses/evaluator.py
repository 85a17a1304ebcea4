"""Evaluates objectives on texts: runs the student, the teacher if an objective needs it, and the chunked loss on both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.losses.chunked import ChunkedTokenLoss
from lit_distill.losses.pairs import LinearizedPairLoss, pair_gradients
from lit_distill.models.lm_head import label_logprobs
from lit_distill.objectives import REFERENCE_SIGNALS, TEACHER_OF_PAIRS, LossTerm, Objective, add_terms, probe
from lit_distill.teachers.base import Partial, Prefetching
from lit_distill.types import Pairs, Sequences

if TYPE_CHECKING:
    from lit_distill.models import CausalLM
    from lit_distill.teachers import LoadedTeacher, TeacherRows

PAIR_LOSS = "pair loss"


class ObjectiveEvaluator:
    """Evaluates a set of objectives with a student and a teacher.

    Args:
        objectives: by name.
        student: receives the gradient.
        teacher: runs only if an objective needs its signals.
        key: YAML key of the objectives, for messages.
        chunk_rows: rows of logits in a chunk; by default about 24 MB of them on a CPU and 128 MB on a GPU.
        reference: a second frozen model; runs only if an objective needs its signals.

    Raises:
        ValueError: if an objective does not return a `LossTerm` of scalar sums.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        student: CausalLM,
        teacher: LoadedTeacher | None,
        key: str,
        chunk_rows: int | None = None,
        reference: LoadedTeacher | None = None,
    ) -> None:
        self.objectives = dict(objectives)
        self.student = student
        self.teacher = teacher
        self.reference = reference
        self.chunk_rows = chunk_rows
        probed = [probe(objective, student.vocabulary_size, f"{key}.{name}") for name, objective in objectives.items()]
        self._counts_by_value = any(probed)

    def __call__(
        self, text: Sequences | Pairs, factors: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """Compute the loss and the objectives' sums on ``text``.

        Args:
            text: texts or pairs. On pairs, token-level objectives get the chosen texts.
            factors: factor of each objective's sum in the loss, by name. Objectives without a factor are not evaluated;
                the teacher does not run if only these need it.

        Returns:
            The loss, ``[]`` float32 with gradient, and the detached sums of each objective by name.
        """
        objectives = {name: self.objectives[name] for name in factors}
        if isinstance(text, Pairs):
            if any(objective.on_pairs for objective in objectives.values()):
                return self._evaluate_pairs(text, objectives, factors)
            text = text.chosen
        teacher = self._teacher_rows(text) if _any_needs(objectives, {"teacher_logits"}) else None
        reference = self._reference_rows(text, objectives)
        head, signals = self.student.head(), _rows_of(text)
        loss = ChunkedTokenLoss(objectives, factors, head, signals, teacher, self.chunk_rows, reference=reference)
        value = loss(self.student.target_rows(text))
        return value, loss.terms

    def _evaluate_pairs(
        self, pairs: Pairs, objectives: Mapping[str, Objective], factors: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """Evaluate chosen and rejected texts in one forward pass of each model that is needed."""
        on_pairs = {name: objective for name, objective in objectives.items() if objective.on_pairs}
        on_tokens = {name: objective for name, objective in objectives.items() if not objective.on_pairs}
        text, num_chosen = pairs.concatenate(), len(pairs.chosen.target_index)
        signals, head, teacher = _rows_of(text), self.student.head(), None
        if _any_needs(on_pairs, TEACHER_OF_PAIRS) and "teacher_logprobs" not in signals:
            teacher = self._teacher_rows(text)
            signals["teacher_logprobs"] = teacher.label_logprobs(signals["labels"], self.chunk_rows)
        elif _any_needs(on_tokens, {"teacher_logits"}):
            teacher = self._teacher_rows(pairs.chosen)
        reference = self._reference_rows(pairs.chosen, on_tokens)

        hidden = self.student.target_rows(text)
        logprobs = label_logprobs(head.in_compute_dtype(), hidden.detach(), signals["labels"], self.chunk_rows)
        pairs_term = pair_gradients(on_pairs, factors, logprobs, signals.get("teacher_logprobs"), text)
        factors = {**factors, PAIR_LOSS: 1.0}
        row_limits = dict.fromkeys(on_tokens, num_chosen)
        signals["logprob_gradients"] = pairs_term.gradients
        if torch.is_grad_enabled():
            on_tokens[PAIR_LOSS] = LinearizedPairLoss()
        else:
            hidden = hidden[:num_chosen]
        loss = ChunkedTokenLoss(on_tokens, factors, head, signals, teacher, self.chunk_rows, row_limits, reference)
        value = loss(hidden) + pairs_term.loss
        if PAIR_LOSS in loss.terms:  # it only adds the gradient: remove its value
            value = value - loss.terms.pop(PAIR_LOSS).total
        return value, loss.terms | pairs_term.terms

    def prefetch(self, text: Sequences | Pairs, names: Collection[str]) -> None:
        """Let a teacher that can do so begin to answer for a text on which the objectives ``names`` will be evaluated."""
        objectives = {name: self.objectives[name] for name in self.objectives if name in names}
        waits = isinstance(text, Sequences) and _any_needs(objectives, {"teacher_logits"})
        if isinstance(self.teacher, Prefetching) and waits:
            self.teacher.prefetch(text)  # type: ignore[arg-type]  # a text, see `waits`

    def _teacher_rows(self, text: Sequences) -> TeacherRows:
        assert self.teacher is not None
        return self.teacher.rows(text)

    def _reference_rows(self, text: Sequences, objectives: Mapping[str, Objective]) -> TeacherRows | None:
        if not _any_needs(objectives, REFERENCE_SIGNALS):
            return None
        assert self.reference is not None
        return self.reference.rows(text.without_recording())

    def counts(self, parts: Iterable[Sequences | Pairs], names: Iterable[str]) -> dict[str, Tensor]:
        """The number of items that each objective in ``names`` counts in all ``parts``, ``[]`` float64, before any backward pass.

        This is free if the objectives count every row or pair. If a count depends on values, it takes a forward pass without
        gradient.
        """
        parts = list(parts)
        if not self._counts_by_value:
            targets = [(p.chosen if isinstance(p, Pairs) else p).target_mask for p in parts]
            rows = torch.stack([mask.sum() for mask in targets]).sum().double()
            # a pair has targets in both texts, or in neither if it is the dummy of a rank without examples
            pairs = torch.stack([mask.any(dim=-1).sum() for mask in targets]).sum().double()
            counts = {name: pairs if self.objectives[name].on_pairs else rows for name in names}
            compared = [name for name in counts if "teacher_logits" in self.objectives[name].needs]
            if compared and isinstance(self.teacher, Partial):
                texts = [p.chosen if isinstance(p, Pairs) else p for p in parts]
                answered = rows.new_tensor(sum(map(self.teacher.num_answered, texts)))
                counts |= dict.fromkeys(compared, answered)
            return counts
        terms: dict[str, LossTerm] = {}
        factors = dict.fromkeys(names, 1.0)
        with torch.no_grad():
            for part in parts:
                _, here = self(part, factors)
                terms = {name: add_terms(terms[name], term) if terms else term for name, term in here.items()}
        device = (parts[0].chosen if isinstance(parts[0], Pairs) else parts[0]).input_ids.device
        return {name: torch.as_tensor(terms[name].count, device=device).double() for name in names}


def global_counts(
    parts: Sequence[tuple[ObjectiveEvaluator, Sequences | Pairs]],
    names: Collection[str],
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The number of items that each objective counts over all micro-batches and ranks, ``[]`` float64 by name.

    Args:
        parts: this rank's texts, each with its evaluator.
        names: names of the objectives to evaluate.
        sum_over_ranks: function that sums a tensor over the ranks.

    Raises:
        ValueError: if there is no objective to evaluate.
    """
    counts: dict[str, Tensor] = {}
    for evaluator in dict.fromkeys(owner for owner, _ in parts):
        texts = [part for owner, part in parts if owner is evaluator]
        counts |= evaluator.counts(texts, [name for name in evaluator.objectives if name in names])
    if not counts:
        raise ValueError("objectives: every weight is 0, so there is nothing to train on. Set at least one weight > 0.")
    return dict(zip(counts, sum_over_ranks(torch.stack(list(counts.values()))), strict=True))


def _any_needs(objectives: Mapping[str, Objective], signals: Collection[str]) -> bool:
    return any(not objective.needs.isdisjoint(signals) for objective in objectives.values())


def _rows_of(text: Sequences) -> dict[str, Tensor]:
    """Labels and signals of the targets, ``[N]`` each."""
    index = text.target_index
    return {
        "labels": text.input_ids.flatten()[index],
        **{name: signal.flatten()[index] for name, signal in text.signals.items()},
    }
