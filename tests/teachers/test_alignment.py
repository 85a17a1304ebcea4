"""Tokens of two tokenizers are compared where they cover the same bytes of the same text, and nowhere else."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import ASSETS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_distill.data.synthetic.tasks import generate_instructions
from lit_distill.teachers.alignment import (
    Coverage,
    adds_space,
    align,
    end_tokens,
    readable_text,
    shared_tokens,
    token_bytes,
)

TASKS = [f"{task['instruction']}\n{task['input']}\n{task['output']}" for task in generate_instructions(0, 300)]
HELD_OUT = [task["output"] for task in generate_instructions(1, 100, "test")]
UNUSUAL = ["Zoë is über-glad 🙂🙃!", "日本語 and 中文", "\ttwo\n\n  lines ", "", " ", "e\u0301 ﬁ  x"]
UNK = "<unk>"
SPECIAL = [UNK, "</s>"]
CHAT = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<turn>{% endif %}{% endfor %}"
NAMES = ("embedded", "byte_level", "unigram", "llama_2")


def fast(backend: Tokenizer, eos: str = "</s>", chat: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = chat
    return tokenizer


def byte_level(size: int = 384, eos: str = "</s>", chat: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2's: numbers are not split, and no space is put before a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", eos, "<turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TASKS, trainer)
    return fast(backend, eos, chat)


def unigram() -> PreTrainedTokenizerFast:
    """As SentencePiece's: "▁" for a space, also before a text, and bytes for characters that it has not seen."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=SPECIAL, unk_token=UNK, show_progress=False)
    backend.train_from_iterator(TASKS, trainer)
    pieces = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    scored = [(piece, 0.0 if piece in SPECIAL else -5.0 - len(pieces[:n]) / 100) for n, piece in enumerate(pieces)]
    backend.model = models.Unigram(scored + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)], 0, byte_fallback=True)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return fast(backend)


def llama_2() -> PreTrainedTokenizerFast:
    """A BPE over "▁" and single bytes, which are the lower ids, but for a line break."""
    pieces = [*SPECIAL, "\n", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeilnorst", "▁r", "ed", "▁red"]
    merges = [("▁", "r"), ("e", "d"), ("▁r", "ed")]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(SPECIAL)
    return fast(backend)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    embedded = AutoTokenizer.from_pretrained(ASSETS / "student")
    return {"embedded": embedded, "byte_level": byte_level(), "unigram": unigram(), "llama_2": llama_2()}


def pairs_of(student, teacher, chat: bool = True) -> dict[int, int]:
    return dict(zip(*(ids.tolist() for ids in shared_tokens(student, teacher, chat)), strict=True))


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def aligned(student, teacher, text: str) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """The response and its end in both tokenizers, and what is aligned."""
    tables = token_bytes(student), token_bytes(teacher)
    ours, theirs = [*ids_of(student, text), student.eos_token_id], [*ids_of(teacher, text), teacher.eos_token_id]
    spaces = adds_space(student, tables[0]), adds_space(teacher, tables[1])
    return ours, theirs, align(ours, theirs, *tables, end_tokens(student, teacher), spaces)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [*TASKS[:20], *UNUSUAL])
def test_the_bytes_of_the_tokens_are_the_text(tokenizers, name: str, text: str) -> None:
    tokenizer = tokenizers[name]
    table = token_bytes(tokenizer)
    joined = b"".join(table[token_id] for token_id in ids_of(tokenizer, text))
    space = b"" if name == "byte_level" or (name == "unigram" and text[:1] in {"", " "}) or not text else b" "
    assert joined == space + text.encode()
    assert adds_space(tokenizer, table) == (name != "byte_level")


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_have_no_bytes_and_added_ones_their_own_text(tokenizers, name: str) -> None:
    backend = Tokenizer.from_str(tokenizers[name].backend_tokenizer.to_str())
    tokenizer = fast(backend, tokenizers[name].eos_token)
    before = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<think é>", special=False), AddedToken("<|user|>", special=True)])
    table = token_bytes(tokenizer)
    assert table[before:] == ["<think é>".encode(), None]
    assert table[tokenizer.eos_token_id] is None
    assert name not in {"unigram", "llama_2"} or table[0] is None


def test_an_unknown_word_has_no_bytes_though_nothing_marks_it_as_special() -> None:
    backend = Tokenizer(models.Unigram([("?", 0.0), ("</s>", 0.0), ("▁a", -1.0)], 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert token_bytes(fast(backend)) == [None, None, b" a"]


@pytest.mark.parametrize("student", NAMES[:3])
@pytest.mark.parametrize("teacher", NAMES[:3])
def test_what_is_aligned_is_what_comparing_all_pairs_of_spans_finds(tokenizers, student: str, teacher: str) -> None:
    one, other = tokenizers[student], tokenizers[teacher]
    before = {name: -1 if name != "byte_level" else 0 for name in NAMES}
    coverage = Coverage()
    for text in HELD_OUT:
        ours, theirs, pairs = aligned(one, other, text)
        own, others = decoded_spans(one, text, before[student]), decoded_spans(other, text, before[teacher])
        expected = [(i, j) for i, a in enumerate(own) for j, b in enumerate(others) if a == b]
        assert pairs == [*expected, (len(ours) - 1, len(theirs) - 1)]
        coverage.add(pairs, ours)
    assert coverage.share == 1 if student == teacher else 0.3 < coverage.share < 1


def decoded_spans(tokenizer, text: str, start: int) -> list[tuple[int, int]]:
    """First byte of each token of an ASCII text, and the byte after it, by decoding every beginning of the tokens."""
    ids = ids_of(tokenizer, text)
    ends = [len(tokenizer.decode(ids[: n + 1])) for n in range(len(ids))]
    return list(zip([start, *ends[:-1]], ends, strict=True))


def pieces_of(data: bytes, draw: random.Random) -> list[bytes]:
    cuts = sorted(draw.sample(range(1, len(data)), draw.randrange(len(data))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def test_characters_cut_anywhere_are_aligned_only_where_both_cut_them() -> None:
    draw = random.Random(0)
    for _ in range(300):
        data = "".join(draw.choice("aü日🙂") for _ in range(draw.randrange(1, 6))).encode()
        ours, theirs = pieces_of(data, draw), pieces_of(data, draw)
        starts = [[sum(map(len, part[:n])) for n in range(len(part))] for part in (ours, theirs)]
        expected = [
            (i, j)
            for i, piece in enumerate(ours)
            for j, other in enumerate(theirs)
            if starts[0][i] == starts[1][j] and len(piece) == len(other)
        ]
        assert align(range(len(ours)), range(len(theirs)), ours, theirs, {}) == expected


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([b"a", b"\xc3", b"\xbc", b"b"], [b"a", b"\xc3\xbc", b"b"], [(0, 0), (3, 2)]),
        ([b"\xf0\x9f", b"\x99\x82", b"!"], [b"\xf0", b"\x9f\x99\x82", b"!"], [(2, 2)]),
        ([b"\xf0\x9f", b"\x99\x82", b"!"], [b"\xf0\x9f", b"\x99", b"\x82", b"!"], [(0, 0), (2, 3)]),
    ],
)
def test_a_character_in_several_tokens_is_skipped_and_what_follows_is_not(ours, theirs, expected) -> None:
    assert align(range(len(ours)), range(len(theirs)), ours, theirs, {}) == expected


@pytest.mark.parametrize(
    ("ours", "theirs", "adds", "expected"),
    [
        ([b" red", b" cat"], [b"red", b" cat"], (True, False), [(1, 1)]),
        ([b"red", b" cat"], [b" red", b" cat"], (False, True), [(1, 1)]),
        ([b"red", b" cat"], [b" ", b"red", b" cat"], (True, True), [(0, 1), (1, 2)]),  # generated without the space
        ([b" red", b" cat"], [b" red", b" cat"], (True, True), [(0, 0), (1, 1)]),
        (
            [b" red", b" cat"],
            [b" red", b" cat"],
            (False, True),
            [(0, 0), (1, 1)],
        ),  # the text itself begins with a space
    ],
)
def test_a_first_word_with_a_space_is_not_aligned_with_one_without(ours, theirs, adds, expected) -> None:
    assert align(range(len(ours)), range(len(theirs)), ours, theirs, {}, adds) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_and_its_copy_share_every_id_and_are_aligned_everywhere(tokenizers, name: str) -> None:
    copy = fast(Tokenizer.from_str(tokenizers[name].backend_tokenizer.to_str()), tokenizers[name].eos_token)
    student_ids, teacher_ids = shared_tokens(tokenizers[name], copy)
    assert student_ids.equal(torch.arange(len(copy)))
    assert teacher_ids.equal(torch.arange(len(copy)))
    for text in UNUSUAL:
        ours, _, pairs = aligned(tokenizers[name], copy, text)
        assert pairs == [(n, n) for n in range(len(ours))]


@pytest.mark.parametrize("teacher", NAMES[1:])
def test_shared_tokens_have_equal_bytes_and_are_used_once(tokenizers, teacher: str) -> None:
    one, other = tokenizers["embedded"], tokenizers[teacher]
    shared = shared_tokens(one, other)
    ours, theirs = (ids.tolist() for ids in shared)
    assert {ids.dtype for ids in shared} == {torch.int64}
    assert ours == sorted(set(ours))
    assert len(set(theirs)) == len(theirs)
    pairs = dict(zip(ours, theirs, strict=True))
    assert pairs.pop(one.eos_token_id) == other.eos_token_id
    own, others = token_bytes(one), token_bytes(other)
    assert all(own[a] == others[b] for a, b in pairs.items())
    assert {own[a] for a in pairs} == {*own} & {*others} - {None}


def test_of_equal_tokens_the_one_that_a_text_is_read_as_is_shared(tokenizers) -> None:
    one, llama = tokenizers["embedded"], tokenizers["llama_2"]
    pairs, own = pairs_of(one, llama), token_bytes(one)
    for character in ("a", "\n", "z"):
        assert pairs[own.index(character.encode())] == ids_of(llama, f"x{character}")[-1]


def test_a_response_ends_as_the_chat_template_or_with_eos() -> None:
    base, chat = byte_level(384, "</s>"), byte_level(400, "<eos>", CHAT)
    turn, eos, end = chat.convert_tokens_to_ids("<turn>"), chat.eos_token_id, base.eos_token_id
    assert end_tokens(base, chat) == {end: turn}
    assert end_tokens(base, chat, chat=False) == {end: eos}
    assert end_tokens(chat, base) == {turn: end, eos: end}
    for is_chat, own in ((True, turn), (False, eos)):
        pairs = pairs_of(chat, base, is_chat)
        assert pairs[own] == end
        assert list(pairs.values()).count(end) == 1


def test_equal_vocabularies_that_end_differently_share_their_ends() -> None:
    base, chat = byte_level(384), byte_level(384, chat=CHAT)
    assert pairs_of(base, chat)[base.eos_token_id] == chat.convert_tokens_to_ids("<turn>")


def test_an_end_that_is_not_marked_as_special_is_shared_as_an_end_alone() -> None:
    plain, chat = byte_level(384), byte_level(384, "<eos>")
    plain.add_tokens(["<stop>"])
    chat.add_tokens(["<stop>"])
    chat.chat_template = CHAT.replace("<turn>", "<stop>")
    pairs, stop = pairs_of(plain, chat), chat.convert_tokens_to_ids("<stop>")
    assert pairs[plain.eos_token_id] == stop
    assert list(pairs.values()).count(stop) == 1
    assert plain.convert_tokens_to_ids("<stop>") not in pairs


def test_ends_are_aligned_after_equal_texts_only() -> None:
    table = [b"a", b"b", None, None]
    assert align([0, 2, 1, 2], [0, 3, 1, 3], table, table, {2: 3}) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert align([0, 1, 2], [0, 3, 1], table, table, {2: 3}) == [(0, 0), (1, 2)]
    assert align([2, 2], [3], table, table, {2: 3}) == [(0, 0)]
    assert align([2], [3, 3], table, table, {2: 3}) == [(0, 0)]


@pytest.mark.parametrize(("other", "place"), [("red caT", 6), ("red", 3), ("red cats", 7), (" red cat", 0)])
def test_different_texts_are_refused_with_the_first_byte(tokenizers, other: str, place: int) -> None:
    tokenizer = tokenizers["byte_level"]
    table = token_bytes(tokenizer)
    with pytest.raises(ValueError, match=f"first at byte {place}:"):
        align(ids_of(tokenizer, "red cat"), ids_of(tokenizer, other), table, table, {})


def test_a_space_that_no_tokenizer_adds_is_part_of_the_text() -> None:
    for adds in ((False, True), (False, False)):
        with pytest.raises(ValueError, match="first at byte 0:"):
            align([0], [1], [b" red", b"red"], [b" red", b"red"], {}, adds)


def test_a_tokenizer_of_another_kind_is_refused_with_its_key(make_tokenizer) -> None:
    words = Tokenizer(models.WordPiece({UNK: 0, "a": 1, "##b": 2}, unk_token=UNK))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    clip = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    clip.pre_tokenizer, clip.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    for tokenizer in (fast(words), fast(clip), make_tokenizer()):
        with pytest.raises(ValueError, match=r"^model\.teacher\.tokenizer: "):
            token_bytes(tokenizer)


def test_a_teacher_without_an_end_is_refused(make_tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^model\.teacher\.tokenizer: .* no EOS"):
        end_tokens(make_tokenizer(), make_tokenizer(eos=None))


def test_a_response_that_stops_inside_a_character_is_read_up_to_it() -> None:
    table = [b" a", b"\xc3", b"\xbc", None, b"\xc3\xbcx\xff"]
    assert readable_text([0, 1, 2, 3], table) == (" aü", 4)
    assert readable_text([0, 1, 2, 1], table, added_space=True) == ("aü", 3)
    assert readable_text([0, 0, 1, 3], table) == (" a a", 2)
    assert readable_text([0, 4, 0], table) == (" a", 1)
    assert readable_text([0, 1, 0], table, ends=[0]) == ("", 1)
