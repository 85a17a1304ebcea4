"""Objectives applied to texts: the student's rows, the teacher's rows where asked for, and the chunked loss over both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.models.chunked_head import TokenLoss, add_terms
from lit_distill.objectives import LossTerm, Objective, probe

if TYPE_CHECKING:
    from lit_distill.models.causal_lm import CausalLM
    from lit_distill.models.head import Head
    from lit_distill.models.teacher import FrozenTeacher
    from lit_distill.types import Sequences


class Measurement:
    """A set of objectives, the student they measure and the teacher they compare it with.

    Args:
        objectives: by name.
        student: receives the gradient.
        teacher: runs only if an objective asks for its logits.
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

    def __call__(self, text: Sequences, factors: Mapping[str, Tensor | float]) -> tuple[Tensor, dict[str, LossTerm]]:
        """The objectives' sums on ``text``.

        Args:
            text: the sequences to measure; their targets are the N rows.
            factors: factor of each objective's sum in the loss, by name. An objective that is not named does not run, nor
                does the teacher if only such objectives ask for it.

        Returns:
            The loss, ``[]`` float32 with its graph, and each objective's detached sums by name.
        """
        mask = text.target_mask
        objectives = {name: self.objectives[name] for name in factors}
        ask_teacher = any("teacher_logits" in objective.needs for objective in objectives.values())
        loss = TokenLoss(
            objectives,
            factors,
            self.student.head(),
            {"labels": text.input_ids[mask], **{name: signal[mask] for name, signal in text.signals.items()}},
            self._teacher_rows(text) if ask_teacher else None,
            self.chunk_rows,
        )
        value = loss(self.student.target_rows(text))
        return value, loss.terms

    def _teacher_rows(self, text: Sequences) -> tuple[Tensor, Head]:
        assert self.teacher is not None
        if text.teacher_hidden is None:
            return self.teacher.target_rows(text), self.teacher.head()
        targets = text.target_mask[:, -text.teacher_hidden.shape[1] :]
        return text.teacher_hidden.to(targets.device)[targets], self.teacher.head()

    def counts(self, parts: Iterable[Sequences], names: Iterable[str]) -> dict[str, Tensor]:
        """How many items the objectives ``names`` count in all ``parts``, ``[]`` float64, known before any gradient.

        Objectives that count every row cost nothing here; one whose count depends on values takes a pass without
        gradient.
        """
        parts = list(parts)
        if not self._counts_by_value:
            rows = torch.stack([part.target_mask.sum() for part in parts]).sum().double()
            return dict.fromkeys(names, rows)
        terms: dict[str, LossTerm] = {}
        factors = dict.fromkeys(names, 1.0)
        with torch.no_grad():
            for part in parts:
                _, here = self(part, factors)
                terms = {name: add_terms(terms[name], term) if terms else term for name, term in here.items()}
        device = parts[0].input_ids.device
        return {name: torch.as_tensor(term.count, device=device).double() for name, term in terms.items()}
