"""Checks, before anything loads, that source, teacher, reference and objectives fit each other; and what a source yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from lit_distill.objectives import REFERENCE_SIGNALS, TEACHER_SIGNALS, SampledReverseKL, check_needs
from lit_distill.sources.base import TEXT_SIGNALS, Source
from lit_distill.teachers import LocalTeacher, cached_parts
from lit_distill.types import ArgumentError, Pairs, Sequences, arguments_of

if TYPE_CHECKING:
    from lit_distill.objectives import Objective
    from lit_distill.sources.targets import TargetFilter
    from lit_distill.teachers import Teacher

REFUSALS = {
    "spread": "needs exact logits of the teacher. Write the cache with form: hidden, or set model.teacher.path.",
    "truncated": (
        "is infinite or undefined where the teacher has probability 0, as it has outside of its top k with tail: renormalize. Set "
        "tail: spread, write the cache with form: hidden, or use an objective such as ForwardKL."
    ),
    "drawn": (
        "is not linear in the teacher's probabilities, so drawn tokens would bias its gradient. Use ForwardKL with temperature: 1, "
        "or write the cache with form: hidden, which is exact for every objective."
    ),
}
"""Why an objective refuses a teacher, by its accuracy, and what to do."""


def checked(source: Source, texts: Iterable[object], told: int) -> Iterator[Sequences | Pairs]:
    """The mini-batches of a source, each of which is refused if it is neither texts nor pairs; so is another number than it told.

    Args:
        source: the source.
        texts: what it yields.
        told: its ``steps_per_batch``, from which the length of the run was computed.
    """
    name, number = type(source).__name__, 0
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, Sequences | Pairs):
            given = type(text).__name__
            raise ArgumentError(source, f"{name}: mini_batches yields {given}, expected Sequences or Pairs.")
        if number > told:
            raise ArgumentError(source, f"{name}: mini_batches yields more than the {told} that steps_per_batch told.")
        yield text
    if number < told:
        raise ArgumentError(source, f"{name}: mini_batches yields {number}, but steps_per_batch told {told}.")


def check_signals(
    source: Source,
    objectives: Mapping[str, Objective],
    corpus_objectives: Mapping[str, Objective],
    teacher: Teacher | None,
    reference: Teacher | None = None,
    targets: TargetFilter | None = None,
) -> None:
    """Check, before anything loads, that source, corpus, teacher and reference provide every signal that the objectives need.

    Args:
        source: of the texts.
        objectives: on the source's texts, by name.
        corpus_objectives: on the corpus, by name.
        teacher: as configured.
        reference: the second frozen model, as configured.
        targets: which tokens are learnt; None for all.

    Raises:
        ValueError: with the key, the missing signal and what to do.
    """
    if targets is not None:
        check_targets({"teacher": teacher, "reference": reference})
    references = REFERENCE_SIGNALS if reference is not None else frozenset()
    given = references | source.provides | (source.provides_with_teacher if teacher is not None else frozenset())
    name = f"the source {type(source).__name__}"
    check_needs(objectives, given, "objectives", name)
    with arguments_of(source):
        source.check(objectives)
    if (source.needs_teacher or source.ranks_by_teacher) and teacher is None:
        raise ValueError(f"source: {name} needs a teacher. Set model.teacher.path.")
    if source.needs_reference and reference is None:
        raise ValueError(
            f"source: {name} needs a reference model. Set model.reference.path, for example to the student's path."
        )
    for key, objective in objectives.items():
        if isinstance(objective, SampledReverseKL) and source.samples_at != objective.temperature:
            raise ValueError(
                f"objectives.{key}: SampledReverseKL at temperature {objective.temperature} is unbiased only for tokens that the "
                "student has sampled at this temperature, from all tokens. Set source: StudentRollouts with this temperature, "
                "on_policy_fraction: 1, top_k: 0, top_p: 1 and no mini_batch_size; or use ReverseKL, which needs no sample."
            )
    if teacher is not None:
        check_teacher(source, teacher, {"objectives": objectives, "corpus_objectives": corpus_objectives})
    if reference is not None:
        check_reference(source, reference)
    on_corpus = references | TEXT_SIGNALS | ({"teacher_logits"} if teacher is not None else frozenset())
    check_needs(corpus_objectives, on_corpus, "corpus_objectives", "a plain-text corpus")


def uses_reference(source: Source, objectives: Iterable[Objective]) -> bool:
    """Whether the source or one of the objectives reads the second frozen model."""
    return source.needs_reference or any(objective.needs & REFERENCE_SIGNALS for objective in objectives)


def check_targets(frozen: Mapping[str, Teacher | None]) -> None:
    """Refuse, before anything loads, to leave out targets of texts that a cache finds by their targets.

    Args:
        frozen: teacher and reference by their YAML key; None if there is none.

    Raises:
        ValueError: with the key and what to do.
    """
    for key, teacher in frozen.items():
        if teacher is not None and (cached := cached_parts(teacher, key)):
            raise ValueError(
                f"targets: the cache in model.{cached[0]} finds a text by all of its targets, so none can be left out. Remove "
                "model.targets, or train with the teacher itself, such as model.teacher.path."
            )


def check_teacher(source: Source, teacher: Teacher, objectives: Mapping[str, Mapping[str, Objective]]) -> None:
    """Check, before anything loads, that the teacher can do what source and objectives ask of it.

    Args:
        source: of the texts.
        teacher: as configured.
        objectives: those of the source's texts and of the corpus, by their YAML key.

    Raises:
        ValueError: with the key, the reason and what to do.
    """
    kind, source_name = type(teacher).__name__, type(source).__name__
    if source.needs_teacher and not isinstance(teacher, LocalTeacher):
        raise ValueError(
            f"source: {source_name} lets the teacher generate or score what it has read along, which needs a local model, but the "
            f"teacher is a {kind}. Set model.teacher.path, or source: DatasetResponses or StudentRollouts."
        )
    if source.ranks_by_teacher and not teacher.knows_all_probabilities:
        raise ValueError(
            f"source: {source_name} ranks responses by the teacher's probability of them, but {kind} does not know that of every "
            "token. Set model.teacher.path, or chosen: dataset."
        )
    _check_texts(source, teacher, "teacher")
    for key, named in objectives.items():
        for name, objective in named.items():
            if key == "corpus_objectives" and objective.needs & TEACHER_SIGNALS and cached_parts(teacher):
                raise ValueError(
                    f"{key}.{name}: {type(objective).__name__} compares with the teacher on a corpus, but {kind} has the items of "
                    "the data only. Give corpus_objectives that need no teacher, such as NextToken, or set model.teacher.path."
                )
            if objective.on_pairs and objective.needs & TEACHER_SIGNALS and not teacher.answers_all:
                raise ValueError(
                    f"{key}.{name}: {type(objective).__name__} needs the teacher's probability of whole responses, but {kind} "
                    "does not answer for every token. Use objectives on single tokens, such as ForwardKL."
                )
            if objective.needs & TEACHER_SIGNALS and teacher.accuracy not in objective.accepts_teacher:
                raise ValueError(f"{key}.{name}: {type(objective).__name__} {REFUSALS[teacher.accuracy]}")
            if teacher.known_tokens is not None and objective.teacher_tokens > teacher.known_tokens:
                raise ValueError(
                    f"{key}.{name}: {type(objective).__name__} takes the teacher's {objective.teacher_tokens} most probable "
                    f"tokens, but {kind} knows {teacher.known_tokens}. Set its top_k to that or less."
                )


def check_reference(source: Source, reference: Teacher) -> None:
    """Check, before anything loads, that the second frozen model can answer for every token of the texts.

    Raises:
        ValueError: with the key, the reason and what to do.
    """
    if not reference.knows_all_probabilities:
        raise ValueError(
            f"reference: {type(reference).__name__} does not know the probability of every token. Set model.reference.path."
        )
    _check_texts(source, reference, "reference")


def _check_texts(source: Source, teacher: Teacher, key: str) -> None:
    kind, source_name = type(teacher).__name__, type(source).__name__
    if source.generates and cached_parts(teacher):
        raise ValueError(
            f"source: {source_name} trains on responses that are generated during training, but {kind} answers only for the texts "
            f"that it was written for. Set source: DatasetResponses, or another {key}, such as model.{key}.path."
        )
    if teacher.fields and not source.keeps_items:
        raise ValueError(
            f"source: {source_name} forgets which record a text belongs to, but {kind} needs the fields "
            f"{', '.join(sorted(teacher.fields))} of the record. Set source: StudentRollouts or DatasetResponses."
        )
