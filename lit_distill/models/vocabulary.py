"""Checks that student and teacher share their tokens: divergences compare logits by id, so an id must be the same token in both."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lit_distill.data.special_tokens import turn_end

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def common_vocabulary_size(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_rows: int,
    teacher_rows: int,
    key: str = "teacher",
) -> int:
    """V, the number of ids, counted from 0, that are the same tokens in both models.

    Heads are often padded beyond their tokenizer (Qwen2.5: 151,665 tokens, 151,936 or 152,064 rows); the padding is cut
    off. Extra tokens at the end of only one of the tokenizers are cut off too, with a warning.

    Args:
        student_tokenizer: tokenizer of the student, which tokenises the texts.
        teacher_tokenizer: tokenizer that the teacher was trained with.
        student_rows: rows of the student's head, tokens and padding.
        teacher_rows: rows of the teacher's head.
        key: the teacher's YAML key below ``model``, such as ``reference``.

    Raises:
        ValueError: if an id stands for different tokens, if a token has no row in its head, or if the end-of-sequence ids differ.
    """
    role = key.partition(".")[0]
    student = _tokens_by_id(student_tokenizer, student_rows, "student")
    teacher = _tokens_by_id(teacher_tokenizer, teacher_rows, key)
    size = min(max(student), max(teacher)) + 1
    different = [token_id for token_id in range(size) if student.get(token_id) != teacher.get(token_id)]
    if different:
        shown = "; ".join(
            f"{token_id} is {_quoted(student, token_id)} in the student and {_quoted(teacher, token_id)} in the {role}"
            for token_id in different[:5]
        )
        other = "A teacher of another family takes model.teacher: AlignedTeacher, see configs/README.md."
        raise ValueError(
            f"{key}: its tokenizer differs from the student's: {len(different)} of the first {size} "
            f"ids differ. {shown}. Choose a model of the student's family as model.{key}.path; if they share "
            f"a vocabulary and only the tokenizer files differ, set model.student.tokenizer or model.{key}.tokenizer."
            + (f" {other}" if key == "teacher" else "")
        )
    _check_special_tokens(student_tokenizer, teacher_tokenizer, key)
    for owner, tokens in (("student", student), (role, teacher)):
        extra = [f"{token_id} {tokens[token_id]!r}" for token_id in sorted(tokens) if token_id >= size]
        if extra:
            log.warning(
                "Only the %s's tokenizer has the tokens %s. They are cut off and must not appear in the data.",
                owner,
                ", ".join(extra[:10]) + (f" and {len(extra) - 10} more" if len(extra) > 10 else ""),
            )
    return size


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's EOS, then those of the generation config and of the chat template, each once.

    Chat models have several. If the result is empty, only the length limit ends a response.
    """
    stops = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    configured = None if generation_config is None else generation_config.eos_token_id
    if configured is not None:
        stops += [configured] if isinstance(configured, int) else [int(stop) for stop in configured]
    return tuple(dict.fromkeys([*stops, *turn_end(tokenizer)[-1:]]))


def shared_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int:
    """The number of ids, counted from 0, that both tokenizers have."""
    return min(max(tokenizer.get_vocab().values()) for tokenizer in (student, teacher)) + 1


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase, rows: int, key: str) -> dict[int, str]:
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if not tokens:
        raise ValueError(f"{key}: its tokenizer has no tokens. Set model.{key}.tokenizer.")
    last = max(tokens)
    if last >= rows:
        raise ValueError(
            f"{key}: its tokenizer has ids up to {last} ({tokens[last]!r}), but its head has only {rows} rows. "
            f"Set model.{key}.tokenizer to the one that the model was trained with, or resize the model's embeddings and save it."
        )
    return tokens


def _quoted(tokens: dict[int, str], token_id: int) -> str:
    return repr(tokens[token_id]) if token_id in tokens else "no token"


def _check_special_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, key: str) -> None:
    """Require the same EOS, or the student would never learn to stop. Other special tokens do not affect the loss: only warn."""
    role = key.partition(".")[0]
    if student.eos_token_id != teacher.eos_token_id:
        raise ValueError(
            f"The student's end-of-sequence token is {student.eos_token!r} ({student.eos_token_id}), the {role}'s "
            f"{teacher.eos_token!r} ({teacher.eos_token_id}), as with a base and an instruct model. The student would "
            f"not learn to stop. Set model.student.tokenizer to the {role}'s, or set model.{key}.path to the {role}'s "
            f"other version. If the {role} really uses the student's token, set model.{key}.tokenizer to the student's."
        )
    for name in ("bos_token", "pad_token", "unk_token"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours is not None and theirs is not None and ours != theirs:
            log.warning(
                "The student's %s is %r, the %s's is %r. The student's is used; the loss is not affected.",
                name,
                ours,
                role,
                theirs,
            )
