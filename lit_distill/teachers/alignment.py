r"""Two tokenizers of one text: the tokens that they share, and the positions where one token of each covers the same bytes.

| | |
|---|---|
| paper | https://arxiv.org/abs/2610.08448, strict one-to-one: a loss on spans of several tokens lowers the result |
| reference code | none read; KDFlow's `simple_ctkd` has the same idea |
| ours | bytes instead of strings: parts of a character compare too; ends of turns have no text and are paired by id |

A position is aligned if the two tokens there begin at the same byte of the text and end at the same byte. Both models
have then read the same text, and their distributions over the shared tokens can be compared. All other positions are
left out.

Many SentencePiece tokenizers put a space before a text (``add_dummy_prefix``); `adds_space` finds out. If only one of
two does, that space lies before the text: its first token, " red", and the other's "red" begin at different bytes and
are not aligned, since one model expects words with a space there and the other expects words without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.models.vocabulary import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token of SentencePiece that stands for one byte."""


class SharedTokens(NamedTuple):
    """The ids of the S tokens that both tokenizers have; every id occurs once."""

    student_ids: Tensor
    """``[S]`` int64, ascending."""
    teacher_ids: Tensor
    """``[S]`` int64: the same tokens in the teacher's tokenizer."""


@dataclass
class Coverage:
    """Share of the student's tokens that are aligned, over any number of texts."""

    aligned: int = 0
    tokens: int = 0

    def add(self, pairs: Sequence[tuple[int, int]], student_ids: Sequence[int]) -> None:
        """Count one text: the result of `align`, and what it was given."""
        self.aligned += len(pairs)
        self.tokens += len(student_ids)

    @property
    def share(self) -> float:
        """From 0 to 1; NaN before the first token."""
        return self.aligned / self.tokens if self.tokens else float("nan")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each id stands for in a text: ``[V]``; None for special tokens, unknown words and ids without a token.

    An added token that is not special stands for its own text.

    Raises:
        ValueError: if the tokenizer is neither a byte-level BPE (GPT-2, Llama 3, Qwen) nor of SentencePiece's kind, with
            "▁" for a space.
    """
    content = _content(tokenizer)
    model, space = content["model"], _space_mark(content, tokenizer)
    alphabet = _byte_alphabet()
    fallback = model.get("byte_fallback") or "ByteFallback" in {part["type"] for part in _parts(content["decoder"])}

    def piece(token: str) -> bytes | None:
        if space is None:
            return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else None
        if fallback and (byte := BYTE_PIECE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return token.replace(space, " ").encode()

    vocabulary = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        found[token_id] = piece(token) or None
    for token_id, added in tokenizer.added_tokens_decoder.items():
        text = added.content if space is None else added.content.replace(space, " ")
        found[token_id] = None if added.special else text.encode()
    for token_id in {*tokenizer.all_special_ids, model.get("unk_id"), vocabulary.get(model.get("unk_token"))} - {None}:
        found[token_id] = None
    return found


def adds_space(tokenizer: PreTrainedTokenizerBase, bytes_of: Sequence[bytes | None]) -> bool:
    """Whether the tokenizer puts a space before a text; ``bytes_of`` are its `token_bytes`."""
    return _joined(tokenizer("a", add_special_tokens=False)["input_ids"], bytes_of) == b" a"


def end_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, chat: bool = True) -> dict[int, int]:
    """Student id -> teacher id of the tokens that end a response: EOS, and the end of a turn in the chat template.

    Args:
        student: its tokenizer.
        teacher: its tokenizer. If it has fewer such tokens, several of the student's have the same one.
        chat: whether responses end as the chat template ends a turn, where there is one. The token that ends them comes first.

    Raises:
        ValueError: if the teacher has no such token, but the student does.
    """
    ours, theirs = (stop_token_ids(tokenizer)[:: -1 if chat else 1] for tokenizer in (student, teacher))
    if ours and not theirs:
        raise ValueError(
            f"model.teacher.tokenizer: {teacher.name_or_path!r} has no EOS token, so the student could not learn from the teacher "
            "where to stop. Set `eos_token` in its tokenizer_config.json."
        )
    return {token_id: theirs[min(place, len(theirs) - 1)] for place, token_id in enumerate(ours)}


def shared_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, chat: bool = True
) -> SharedTokens:
    """The tokens with equal bytes in both tokenizers, and those that end a response.

    Each id is used once. Of several tokens with the same bytes, the one that a text is read as is taken: an added token,
    else a piece, else a token for a single byte, else the lower id. If both tokenizers have the same vocabulary and
    ends, all ids are shared, special ones too.

    Args:
        student: its tokenizer.
        teacher: its tokenizer.
        chat: see `end_tokens`. Of two ends with one counterpart, the first is shared.

    Raises:
        ValueError: as `token_bytes` and `end_tokens`.
    """
    ends = end_tokens(student, teacher, chat)
    vocabulary = student.get_vocab()
    if vocabulary == teacher.get_vocab() and all(ours == theirs for ours, theirs in ends.items()):
        every = torch.arange(max(vocabulary.values()) + 1)
        return SharedTokens(every, every)
    ours, theirs = _ids_by_bytes(student, ends.keys()), _ids_by_bytes(teacher, ends.values())
    pairs = {ours[piece]: theirs[piece] for piece in ours.keys() & theirs.keys()}
    first: dict[int, int] = {}
    for student_id, teacher_id in ends.items():
        first.setdefault(teacher_id, student_id)
    pairs |= {student_id: teacher_id for teacher_id, student_id in first.items()}
    student_ids, teacher_ids = torch.tensor(sorted(pairs.items())).reshape(-1, 2).unbind(1)
    return SharedTokens(student_ids.contiguous(), teacher_ids.contiguous())


def align(
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    student_bytes: Sequence[bytes | None],
    teacher_bytes: Sequence[bytes | None],
    ends: Mapping[int, int],
    added_spaces: tuple[bool, bool] = (False, False),
) -> list[tuple[int, int]]:
    """Positions ``(i, j)``, ascending in both, where one token of each tokenizer covers the same bytes of a text; linear time.

    Args:
        student_ids: tokens of the text, perhaps with ends.
        teacher_ids: tokens of the same text.
        student_bytes: `token_bytes` of the student.
        teacher_bytes: `token_bytes` of the teacher.
        ends: `end_tokens`: two such tokens are aligned if the text before them is the same. Other special tokens never are.
        added_spaces: `adds_space` of student and teacher. A space that only one of them has, and adds, is not part of the text.

    Raises:
        ValueError: if the tokens stand for different texts; the message names the first byte that differs.
    """
    ours, theirs = _joined(student_ids, student_bytes, ends.keys()), _joined(teacher_ids, teacher_bytes, ends.values())
    ours_from, theirs_from = 0, 0
    if added_spaces[0] and ours == b" " + theirs:
        ours_from = -1
    elif added_spaces[1] and theirs == b" " + ours:
        theirs_from = -1
    elif ours != theirs:
        raise ValueError(_difference(ours, theirs))
    spans = list(_spans(teacher_ids, teacher_bytes, {token_id: token_id for token_id in ends.values()}, theirs_from))
    places = {span: j for j, span in reversed(list(enumerate(spans))) if span is not None}
    own = _spans(student_ids, student_bytes, ends, ours_from)
    return [(i, places.pop(span)) for i, span in enumerate(own) if span in places]


def readable_text(
    ids: Sequence[int], bytes_of: Sequence[bytes | None], ends: Collection[int] = (), added_space: bool = False
) -> tuple[str, int]:
    """The text of the longest beginning of ``ids`` that is valid UTF-8, for the other tokenizer to read, and its number of tokens.

    A model may stop inside a character, or generate bytes that are no character at all: `align` what comes before.

    Args:
        ids: tokens of a response. Special tokens have no text.
        bytes_of: `token_bytes` of its tokenizer.
        ends: ids of its tokenizer that end a response.
        added_space: `adds_space` of its tokenizer; one space at the start is then left out.
    """
    sizes = [0 if token_id in ends else len(bytes_of[token_id] or b"") for token_id in ids]
    data, count, size = _joined(ids, bytes_of, ends), len(ids), sum(sizes)
    while True:
        try:
            return data[:size].decode().removeprefix(" " if added_space else ""), count
        except UnicodeDecodeError as error:
            while size > error.start:
                count -= 1
                size -= sizes[count]


def _joined(ids: Iterable[int], bytes_of: Sequence[bytes | None], without: Collection[int] = ()) -> bytes:
    return b"".join(bytes_of[token_id] or b"" for token_id in ids if token_id not in without)


def _spans(
    ids: Iterable[int], bytes_of: Sequence[bytes | None], ends: Mapping[int, int], start: int
) -> Iterator[tuple[int, int, int | None] | None]:
    """First byte, byte after the last one, and the teacher's id if it is an end; None for tokens without text."""
    for token_id in ids:
        if token_id in ends:
            yield start, start, ends[token_id]
        elif piece := bytes_of[token_id]:
            yield start, start + len(piece), None
            start += len(piece)
        else:
            yield None


def _difference(ours: bytes, theirs: bytes) -> str:
    place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    around = slice(max(place - 20, 0), place + 10)
    return (
        "teacher: its tokens and the student's stand for different texts, first at byte "
        f"{place}: {theirs[around]!r} in the teacher, {ours[around]!r} in the student. A tokenizer that changes texts, "
        "for example to lower case, cannot be aligned: choose another teacher, or set model.teacher.tokenizer."
    )


def _ids_by_bytes(tokenizer: PreTrainedTokenizerBase, without: Collection[int]) -> dict[bytes, int]:
    """The id of each piece of text that a token stands for."""
    pieces, added = token_bytes(tokenizer), tokenizer.added_tokens_decoder
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}

    def rank(token_id: int) -> tuple[bool, bool, int]:
        single_byte = BYTE_PIECE.fullmatch(names[token_id]) is not None and len(pieces[token_id] or b"") == 1
        return token_id not in added, single_byte, token_id

    found: dict[bytes, int] = {}
    for token_id in sorted(names, key=rank):
        piece = pieces[token_id]
        if piece is not None and token_id not in without:
            found.setdefault(piece, token_id)
    return found


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(_unsupported(tokenizer, f"{type(tokenizer).__name__} has no file tokenizer.json"))
    return json.loads(backend.to_str())


def _space_mark(content: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a space is in tokens of SentencePiece's kind; None for a byte-level tokenizer.

    Raises:
        ValueError: for any other kind.
    """
    parts = [*_parts(content["decoder"]), *_parts(content["pre_tokenizer"])]
    model = content["model"]
    affix = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if affix:
        raise ValueError(_unsupported(tokenizer, f"it marks parts of words with {affix!r}"))
    if any(part["type"] == "ByteLevel" for part in parts):
        return None
    for part in parts:
        if part["type"] == "Metaspace":
            return str(part["replacement"])
        if part["type"] == "Replace" and part["content"] == " " and "String" in part["pattern"]:
            return str(part["pattern"]["String"])
    kinds = ", ".join(dict.fromkeys(part["type"] for part in parts)) or "nothing"
    raise ValueError(_unsupported(tokenizer, f"{model['type']} with {kinds}"))


def _unsupported(tokenizer: PreTrainedTokenizerBase, why: str) -> str:
    return (
        f"model.teacher.tokenizer: the bytes of the tokens of {tokenizer.name_or_path!r} are not known ({why}). If student "
        "and teacher have different tokenizers, each needs a byte-level BPE, as GPT-2, Llama 3 and Qwen have, or one of "
        "SentencePiece's kind. Choose a teacher with the student's tokenizer."
    )


def _parts(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A decoder or pre-tokenizer, or those of a sequence."""
    if component is not None and component["type"] == "Sequence":
        for part in component.get("decoders") or component.get("pretokenizers") or ():
            yield from _parts(part)
    elif component is not None:
        yield component


def _byte_alphabet() -> dict[str, int]:
    """The character that a byte-level tokenizer writes for each byte, as GPT-2's ``bytes_to_unicode``."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
