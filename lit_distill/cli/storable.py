"""What `lit-distill cache` refuses to store, before anything loads."""

from __future__ import annotations

from lit_distill.teachers import LocalTeacher, Teacher, walk
from lit_distill.teachers.following import StudentTeacher
from lit_distill.teachers.writing import CacheOptions


def check_storable(teacher: Teacher, options: CacheOptions) -> None:
    """Refuse a teacher whose predictions cannot be stored, options of another form, and more than the teacher knows.

    Raises:
        ValueError: with the argument.
    """
    _check_teacher(teacher)
    _check_options(options)
    _check_known(teacher, options)


def _check_teacher(teacher: Teacher) -> None:
    """Refuse a teacher whose predictions cannot be stored.

    Raises:
        ValueError: beginning with ``teacher``.
    """
    if not teacher.answers_all:
        raise ValueError(
            "teacher: it has another tokenizer and does not answer for every token, so it cannot be cached. Use it in `fit` itself."
        )
    for key, part in walk(teacher):
        if isinstance(part, LocalTeacher) and part.spec.shared_with_student:
            raise ValueError(
                f"{key}.shared_with_student: a cache needs a teacher of its own. Set model.{key}.path to the base, without it."
            )
        if isinstance(part, StudentTeacher):
            raise ValueError(
                f"{key}: StudentTeacher follows the student, so it predicts something else at every step and cannot be cached. "
                "Train without a cache, or set model.teacher.path."
            )
    if teacher.accuracy not in ("exact", "spread"):
        reason = "tail: renormalize leaves out" if teacher.accuracy == "truncated" else "a cache of form sampled lacks"
        raise ValueError(
            f"teacher: {reason} most tokens, so it cannot be cached. Set tail: spread, or model.teacher.path."
        )


def _check_options(options: CacheOptions) -> None:
    """Refuse an option of another form.

    Raises:
        ValueError: with the option.
    """
    default = CacheOptions()
    for form, name in (("topk", "top_k"), ("sampled", "num_draws")):
        given = getattr(options, name)
        if options.form != form and given != getattr(default, name):
            raise ValueError(
                f"{name}: {given} belongs to form {form}, but form is {options.form}. Give form: {form}, or no {name}."
            )


def _check_known(teacher: Teacher, options: CacheOptions) -> None:
    """Refuse to store more of a teacher than it knows.

    Raises:
        ValueError: with the argument.
    """
    known = teacher.known_tokens
    if known is None:
        return
    if options.form == "sampled":
        raise ValueError(
            f"form: sampled draws from all tokens, but the teacher knows the probabilities of {known} of them. Choose form: topk."
        )
    if options.form == "topk" and options.top_k > known:
        raise ValueError(
            f"top_k: {options.top_k}, but the teacher knows the probabilities of {known} tokens. Give {known} or fewer."
        )
