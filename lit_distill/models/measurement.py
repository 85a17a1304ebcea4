"""Objectives applied to texts: the student's rows, the teacher's rows where asked for, and the chunked loss over both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.models.chunked_head import TokenLoss, label_logprobs
from lit_distill.models.comparison import AskedOfTokens, compare
from lit_distill.objectives import TEACHER_OF_PAIRS, LossTerm, Objective, add_terms, probe
from lit_distill.types import Pairs, Sequences

if TYPE_CHECKING:
    from lit_distill.models.causal_lm import CausalLM
    from lit_distill.models.head import Head
    from lit_distill.models.teacher import FrozenTeacher

ASKED = "what pairs ask of tokens"


class Measurement:
    """A set of objectives, the student they measure and the teacher they compare it with.

    Args:
        objectives: by name.
        student: receives the gradient.
        teacher: runs only if an objective asks for what it says.
        key: where the objectives stand in the YAML, for messages.
        chunk_rows: rows of logits at a time; by default some 30 MB of them on a processor, 128 on a GPU.

    Raises:
        ValueError: if what an objective returns is no `LossTerm` of scalar sums.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        student: CausalLM,
        teacher: FrozenTeacher | None,
        key: str,
        chunk_rows: int | None = None,
    ) -> None:
        self.objectives = dict(objectives)
        self.student = student
        self.teacher = teacher
        self.chunk_rows = chunk_rows
        probed = [probe(objective, student.vocabulary_size, f"{key}.{name}") for name, objective in objectives.items()]
        self._counts_by_value = any(probed)

    def __call__(
        self, text: Sequences | Pairs, factors: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """The objectives' sums on ``text``.

        Args:
            text: what to measure. On pairs, objectives on tokens see the chosen texts.
            factors: factor of each objective's sum in the loss, by name. An objective that is not named does not run, nor
                does the teacher if only such objectives ask for it.

        Returns:
            The loss, ``[]`` float32 with its graph, and each objective's detached sums by name.
        """
        objectives = {name: self.objectives[name] for name in factors}
        if isinstance(text, Pairs):
            if any(objective.on_pairs for objective in objectives.values()):
                return self._compare(text, objectives, factors)
            text = text.chosen
        teacher = self._teacher_rows(text) if _asked(objectives, {"teacher_logits"}) else None
        loss = TokenLoss(objectives, factors, self.student.head(), _rows_of(text), teacher, self.chunk_rows)
        value = loss(self.student.target_rows(text))
        return value, loss.terms

    def _compare(
        self, pairs: Pairs, objectives: Mapping[str, Objective], factors: Mapping[str, Tensor | float]
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """Chosen and rejected texts in one forward of each model that is asked."""
        on_pairs = {name: objective for name, objective in objectives.items() if objective.on_pairs}
        on_tokens = {name: objective for name, objective in objectives.items() if not objective.on_pairs}
        text, num_chosen = pairs.both(), int(pairs.chosen.target_mask.sum())
        signals, head, teacher = _rows_of(text), self.student.head(), None
        if _asked(on_pairs, TEACHER_OF_PAIRS) and "teacher_logprobs" not in signals:
            teacher = self._teacher_rows(text)
            signals["teacher_logprobs"] = label_logprobs(teacher[1], teacher[0], signals["labels"], self.chunk_rows)
        elif _asked(on_tokens, {"teacher_logits"}):
            teacher = self._teacher_rows(pairs.chosen)

        hidden = self.student.target_rows(text)
        logprobs = label_logprobs(head.in_compute_dtype(), hidden.detach(), signals["labels"], self.chunk_rows)
        compared = compare(on_pairs, factors, logprobs, signals.get("teacher_logprobs"), text.target_mask)
        factors = {**factors, ASKED: 1.0}
        leading = dict.fromkeys(on_tokens, num_chosen)
        signals["logprob_gradients"] = compared.gradients
        if torch.is_grad_enabled():
            on_tokens[ASKED] = AskedOfTokens()
        else:
            hidden = hidden[:num_chosen]
        loss = TokenLoss(on_tokens, factors, head, signals, teacher, self.chunk_rows, leading)
        value = loss(hidden) + compared.loss
        if ASKED in loss.terms:  # gave its gradient; the value is that of the pairs
            value = value - loss.terms.pop(ASKED).total
        return value, loss.terms | compared.terms

    def _teacher_rows(self, text: Sequences) -> tuple[Tensor, Head]:
        assert self.teacher is not None
        if text.teacher_hidden is None:
            return self.teacher.target_rows(text), self.teacher.head()
        targets = text.target_mask[:, -text.teacher_hidden.shape[1] :]
        return text.teacher_hidden.to(targets.device)[targets], self.teacher.head()

    def counts(self, parts: Iterable[Sequences | Pairs], names: Iterable[str]) -> dict[str, Tensor]:
        """How many items the objectives ``names`` count in all ``parts``, ``[]`` float64, known before any gradient.

        Objectives that count every row or pair cost nothing here; one whose count depends on values takes a pass without
        gradient.
        """
        parts = list(parts)
        if not self._counts_by_value:
            targets = [(p.chosen if isinstance(p, Pairs) else p).target_mask for p in parts]
            rows = torch.stack([mask.sum() for mask in targets]).sum().double()
            # a pair has both texts or is the dummy of a rank without items, which has neither
            pairs = torch.stack([mask.any(dim=-1).sum() for mask in targets]).sum().double()
            return {name: pairs if self.objectives[name].on_pairs else rows for name in names}
        terms: dict[str, LossTerm] = {}
        factors = dict.fromkeys(names, 1.0)
        with torch.no_grad():
            for part in parts:
                _, here = self(part, factors)
                terms = {name: add_terms(terms[name], term) if terms else term for name, term in here.items()}
        device = (parts[0].chosen if isinstance(parts[0], Pairs) else parts[0]).input_ids.device
        return {name: torch.as_tensor(term.count, device=device).double() for name, term in terms.items()}


def global_counts(
    parts: Sequence[tuple[Measurement, Sequences | Pairs]],
    names: Collection[str],
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """How many items each objective counts over all micro-batches and ranks, ``[]`` float64 by name.

    Args:
        parts: this rank's texts, and who measures each.
        names: of the objectives that are to run.
        sum_over_ranks: adds up a tensor of sums.

    Raises:
        ValueError: if none of them sees a text.
    """
    counts: dict[str, Tensor] = {}
    for measure in dict.fromkeys(owner for owner, _ in parts):
        mine = [part for owner, part in parts if owner is measure]
        counts |= measure.counts(mine, [name for name in measure.objectives if name in names])
    if not counts:
        raise ValueError("model.objectives: every weight is 0, so there is nothing to learn. Give one a weight.")
    return dict(zip(counts, sum_over_ranks(torch.stack(list(counts.values()))), strict=True))


def _asked(objectives: Mapping[str, Objective], signals: Collection[str]) -> bool:
    return any(not objective.needs.isdisjoint(signals) for objective in objectives.values())


def _rows_of(text: Sequences) -> dict[str, Tensor]:
    """What is known of the targets, ``[N]`` each."""
    mask = text.target_mask
    return {"labels": text.input_ids[mask], **{name: signal[mask] for name, signal in text.signals.items()}}
