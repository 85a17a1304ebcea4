"""A cached teacher predicts what the teacher did: to the bit from hidden states, as its rows say from k tokens or from draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from caches import (
    assert_same,
    keys_of,
    named,
    num_texts,
    of_texts,
    tensors_of,
    values_of,
)
from tiny import ragged_text, tiny_llama
from torch import Tensor

from lit_distill.functional.sparse import draw, top_k
from lit_distill.models import CausalLM
from lit_distill.teachers import CachedTeacher, FrozenTeacher
from lit_distill.teachers.local import HiddenRows
from lit_distill.teachers.sparse import DrawnRows, TopKRows
from lit_distill.teachers.store import Shards, texts_of
from lit_distill.teachers.writing import CacheOptions, CacheWriter, Progress
from lit_distill.types import ArgumentError, Item, Sequences

every_form = pytest.mark.parametrize("form", ["hidden", "topk", "sampled"])


@pytest.fixture
def text() -> Sequences:
    return named(ragged_text())


@pytest.fixture
def teacher() -> FrozenTeacher:
    """Whose predictions are far from uniform."""
    model = tiny_llama(hidden=24)
    with torch.no_grad():
        model.lm_head.weight *= 40
    return FrozenTeacher(CausalLM(model))


def all_logits(rows, text: Sequences) -> Tensor:
    return rows.logits(slice(0, len(text.target_index)))


def labels_of(text: Sequences) -> Tensor:
    return text.input_ids.flatten()[text.target_index]


@pytest.mark.parametrize("multiplies_fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_from_hidden_states_are_the_teachers_to_the_bit(
    teacher, text, tmp_path, monkeypatch, dtype, multiplies_fast
) -> None:
    monkeypatch.setattr("lit_distill.models.precision.multiplies_fast", lambda *_: multiplies_fast)
    teacher.lm.to(dtype)
    cached = of_texts(tmp_path, teacher, text)
    assert torch.equal(all_logits(cached.rows(text), text), all_logits(teacher.rows(text), text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_are_stored_in_the_dtype_of_the_teacher(teacher, text, tmp_path, dtype) -> None:
    teacher.lm.to(dtype)
    of_texts(tmp_path, teacher, text)
    assert {shard["hidden"].dtype for shard in tensors_of(tmp_path)} == {dtype}


def test_hidden_states_may_be_stored_in_half_the_bytes(teacher, text, tmp_path) -> None:
    rows = of_texts(tmp_path, teacher, text, dtype=torch.bfloat16).rows(text)
    assert isinstance(rows, HiddenRows)
    assert torch.equal(rows.hidden, teacher.rows(text).hidden.bfloat16())
    assert rows.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),  # squeezed logits
        ("granite", {"logits_scaling": 4.0}),  # divided
        ("cohere", {"logit_scale": 0.5}),  # multiplied
        ("phi", {}),  # a head with a bias
    ],
)
def test_scale_soft_cap_and_bias_of_the_head_are_kept(tmp_path, kind, settings) -> None:
    model = architectures.tiny(kind, **settings)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    text = named(ragged_text(vocabulary=architectures.VOCABULARY))
    logits = all_logits(of_texts(tmp_path, FrozenTeacher(CausalLM(model)), text).rows(text), text)
    whole = model(input_ids=text.input_ids, attention_mask=text.attention_mask).logits.detach()
    torch.testing.assert_close(logits, whole[:, :-1][text.target_mask[:, 1:]], rtol=1e-4, atol=1e-4)


@every_form
def test_padded_rows_of_a_head_are_cut_off(text, tmp_path, form) -> None:
    teacher = FrozenTeacher(CausalLM(tiny_llama(hidden=24, vocabulary=64), vocabulary_size=41))
    cached = of_texts(tmp_path, teacher, text, form=form, top_k=5)
    assert all_logits(cached.rows(text), text).shape == (len(text.target_index), 41)


def test_tokens_that_another_teacher_lacks_are_cut_off_from_hidden_states(teacher, text, tmp_path) -> None:
    of_texts(tmp_path, teacher, text)
    fewer = CachedTeacher(str(tmp_path)).load(30, None)
    assert torch.equal(all_logits(fewer.rows(text), text), all_logits(teacher.rows(text), text)[:, :30])


@pytest.mark.parametrize("form", ["topk", "sampled"])
def test_tokens_that_another_teacher_lacks_are_refused_for_other_forms(teacher, text, tmp_path, form) -> None:
    of_texts(tmp_path, teacher, text, form=form, top_k=5)
    with pytest.raises(ValueError, match=r"is about 41 tokens, but another teacher shares only 30 .* form: hidden"):
        CachedTeacher(str(tmp_path)).load(30, None)


def test_a_student_with_fewer_rows_is_refused(teacher, text, tmp_path, monkeypatch) -> None:
    of_texts(tmp_path, teacher, text)
    monkeypatch.setattr("lit_distill.teachers.cached.tokenizer_content", lambda _: "")
    opening: Any = SimpleNamespace(tokenizer=None, student_rows=40)
    with pytest.raises(ValueError, match=r"^path: .* is about 41 tokens, but the student's head has only 40 rows"):
        CachedTeacher(str(tmp_path)).open(opening, "teacher")


def test_the_head_is_read_into_the_memory_of_the_host_whatever_the_context(teacher, text, tmp_path) -> None:
    of_texts(tmp_path, teacher, text)
    with torch.device("meta"):  # Lightning loads models in the context of their device
        cached = CachedTeacher(str(tmp_path)).load(None, None)
    assert torch.equal(all_logits(cached.rows(text), text), all_logits(teacher.rows(text), text))


@every_form
def test_rows_belong_to_their_texts_whatever_the_batch(teacher, text, tmp_path, form) -> None:
    cached = of_texts(tmp_path, teacher, text, form=form, top_k=5)
    order = torch.tensor([3, 0, 3, 4])
    part = text.select(order)
    each = [all_logits(cached.rows(text.slice(row, row + 1)), text.slice(row, row + 1)) for row in order.tolist()]
    assert torch.equal(all_logits(cached.rows(part), part), torch.cat(each))


@every_form
def test_padding_on_the_left_finds_the_same_rows(teacher, text, tmp_path, form) -> None:
    cached = of_texts(tmp_path, teacher, text, form=form, top_k=5)
    moved = Sequences(
        F.pad(text.input_ids, (2, 0)), F.pad(text.attention_mask, (2, 0)), F.pad(text.target_mask, (2, 0))
    )
    expected = all_logits(cached.rows(text), text)
    assert torch.equal(all_logits(cached.rows(named(moved)), moved), expected)


@pytest.mark.parametrize("tail", ["spread", "renormalize"])
def test_top_k_rows_are_those_of_the_teachers_logits(teacher, text, tmp_path, tail) -> None:
    of_texts(tmp_path, teacher, text, form="topk", top_k=5)
    cached = CachedTeacher(str(tmp_path), tail).load(None, None)
    logits, labels = all_logits(teacher.rows(text), text), labels_of(text)
    ids, logprobs = top_k(logits, 5)
    exact = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    made = TopKRows(ids, logprobs.bfloat16().float(), labels, exact, 41, tail)
    torch.testing.assert_close(all_logits(cached.rows(text), text), all_logits(made, text))


def test_the_log_probability_of_a_label_is_exact_in_top_k(teacher, text, tmp_path) -> None:
    rows = of_texts(tmp_path, teacher, text, form="topk", top_k=2).rows(text)
    exact = all_logits(teacher.rows(text), text).log_softmax(-1).gather(1, labels_of(text)[:, None])[:, 0]
    torch.testing.assert_close(rows.label_logprobs(labels_of(text)), exact)


def test_drawn_rows_are_those_of_the_same_draws(teacher, text, tmp_path) -> None:
    cached = of_texts(tmp_path, teacher, text, form="sampled", num_draws=7)
    for row, one in enumerate(texts_of(text)):
        part = text.slice(row, row + 1)
        logits = all_logits(teacher.rows(text), text)[text.masks.targets.nonzero()[:, 0] == row]
        draws = draw(logits, 7, torch.Generator().manual_seed(one.key[0] % 2**63))
        offsets = F.pad(draws.sizes.cumsum(0), (1, 0))
        made = DrawnRows(offsets, draws.ids, draws.counts, 7, 41)
        assert torch.equal(all_logits(cached.rows(part), part), all_logits(made, part))


def test_the_mean_of_the_drawn_frequencies_is_the_probability(teacher, text, tmp_path) -> None:
    p = all_logits(teacher.rows(text), text).softmax(-1)
    num_seeds, num_draws = 60, 63
    mean = torch.zeros_like(p)
    for seed in range(num_seeds):
        rows = of_texts(tmp_path / str(seed), teacher, text, form="sampled", num_draws=num_draws, seed=seed).rows(text)
        frequencies = all_logits(rows, text).exp()
        torch.testing.assert_close(frequencies.sum(-1), torch.ones(len(p)))
        mean += frequencies / num_seeds
    deviation = (p * (1 - p) / (num_seeds * num_draws)).sqrt()
    assert float(((mean - p).abs() / deviation.clamp(min=1e-9))[p > 1e-4].max()) < 6


def test_draws_of_a_text_do_not_depend_on_its_batch(teacher, text, tmp_path) -> None:
    of_texts(tmp_path / "one", teacher, text, form="sampled")
    backwards = [text.slice(row, row + 1) for row in (4, 2, 3, 0, 1)]
    of_texts(tmp_path / "other", teacher, *backwards, form="sampled")
    assert_same(values_of(tmp_path / "one"), values_of(tmp_path / "other"))


def test_another_seed_draws_other_tokens(teacher, text, tmp_path) -> None:
    one, other = (of_texts(tmp_path / str(seed), teacher, text, form="sampled", seed=seed) for seed in (0, 1))
    assert not torch.equal(all_logits(one.rows(text), text), all_logits(other.rows(text), text))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"form": "hidden"}, 24 * 4),
        ({"form": "hidden", "dtype": torch.bfloat16}, 24 * 2),
        ({"form": "topk", "top_k": 5}, 4 + 5 * 2 + 4),  # 5 ids of 6 bits, 5 bfloat16, the label's float32
    ],
)
def test_a_target_takes_the_bytes_that_were_promised(teacher, text, tmp_path, options, expected) -> None:
    of_texts(tmp_path, teacher, text, **options)
    values = values_of(tmp_path).values()
    assert sum(value.nbytes for kept in values for value in kept.values()) == expected * len(text.target_index)
    assert CacheOptions(**options).bytes_per_row(41, 24, torch.float32) == expected


def test_a_drawn_token_takes_two_bytes_and_a_target_one(teacher, text, tmp_path) -> None:
    rows = of_texts(tmp_path, teacher, text, form="sampled", num_draws=9).rows(text)
    distinct = int(all_logits(rows, text).isfinite().sum())
    values = values_of(tmp_path).values()
    size = sum(value.nbytes for kept in values for value in kept.values())
    assert size == 2 * distinct + len(text.target_index)  # 6 bits of an id and 7 of a count; the number of tokens
    assert size <= CacheOptions("sampled", num_draws=9).bytes_per_row(41, 24, torch.float32) * len(text.target_index)


def test_bytes_of_a_target_with_a_vocabulary_of_150_thousand_tokens() -> None:
    sizes = [CacheOptions(form).bytes_per_row(151_936, 896, torch.bfloat16) for form in ("hidden", "topk", "sampled")]
    assert sizes == [1792, 144 + 128 + 4, 50 * 3 + 1]


def altered(text: Sequences, row: int, column: int, token: int) -> Sequences:
    ids = text.input_ids.clone()
    ids[row, column] = token
    return replace(text, input_ids=ids)


@every_form
def test_an_altered_token_is_named_with_its_item_its_place_and_both_ids(teacher, text, tmp_path, form) -> None:
    cached = of_texts(tmp_path, teacher, text, form=form, top_k=5)
    before = int(text.input_ids[2, 4])
    wrong = altered(text, 2, 4, (before + 1) % 41)
    with pytest.raises(
        ValueError, match=rf"^path: .*item '2' .*its token 4 is {(before + 1) % 41} now and was {before} when"
    ):
        cached.rows(wrong)


def test_a_shorter_text_is_named_with_both_lengths(teacher, text, tmp_path) -> None:
    cached = of_texts(tmp_path, teacher, text)
    shorter = replace(
        text,
        attention_mask=text.attention_mask * (torch.arange(12) < 6),
        target_mask=text.target_mask & (torch.arange(12) < 6),
    )
    with pytest.raises(ValueError, match=r"item '0' .*it has 6 tokens now and had 12 when"):
        cached.rows(shorter)


def test_other_targets_are_named(teacher, text, tmp_path) -> None:
    cached = of_texts(tmp_path, teacher, text)
    others = replace(text, target_mask=text.target_mask & (torch.arange(12) != 4))
    with pytest.raises(
        ValueError, match=r"item '0' .*its tokens are those in the cache, but other ones of them are learnt"
    ):
        cached.rows(others)


def test_an_item_that_was_never_cached_is_named(teacher, text, tmp_path) -> None:
    cached = of_texts(tmp_path, teacher, text)
    others = named(altered(text, 0, 5, (int(text.input_ids[0, 5]) + 1) % 41), *(f"new {row}" for row in range(5)))
    with pytest.raises(
        ValueError, match=r"item 'new 0' .*the cache was not written for it. It was written for: 3 items of train"
    ):
        cached.rows(others)


def test_of_items_with_one_id_the_most_similar_is_compared(teacher, text, tmp_path) -> None:
    same = named(text, *["same"] * 5)
    cached = of_texts(tmp_path, teacher, same)
    before = int(text.input_ids[3, 6])
    with pytest.raises(ValueError, match=rf"its token 6 is {(before + 1) % 41} now and was {before} when"):
        cached.rows(altered(same, 3, 6, (before + 1) % 41))


def test_the_rows_of_a_corpus_are_refused_as_such(teacher, text, tmp_path) -> None:
    cached = of_texts(tmp_path, teacher, text)
    with pytest.raises(ValueError, match=r"^path: .* not the rows of a corpus. Give model.corpus_objectives"):
        cached.rows(ragged_text())


@pytest.mark.parametrize("name", ["", "ü/😀 日本", "two\nlines", "x" * 5000, "\ud800", "../../etc"])
def test_odd_ids_are_stored_and_named(teacher, text, tmp_path, name) -> None:
    odd = named(text, *[name] * 5)
    cached = of_texts(tmp_path, teacher, odd)
    assert all_logits(cached.rows(odd), odd).isfinite().all()
    with pytest.raises(ValueError, match="its token 5 is"):
        cached.rows(altered(odd, 1, 5, (int(text.input_ids[1, 5]) + 1) % 41))


@every_form
def test_texts_of_one_target_and_of_none(teacher, text, tmp_path, form) -> None:
    columns = torch.arange(12)
    few = replace(text, target_mask=(columns == 4) & (torch.arange(5)[:, None] != 2))
    cached = of_texts(tmp_path, teacher, few, form=form, top_k=5)
    assert num_texts(tmp_path) == 4
    assert all_logits(cached.rows(few), few).shape == (4, 41)


@every_form
def test_the_dummy_of_a_rank_without_items_has_no_rows(teacher, text, tmp_path, form) -> None:
    rows = of_texts(tmp_path, teacher, text, form=form, top_k=5).rows(text.without_targets())
    assert rows.logits(slice(0, 0)).shape == (0, 41)


@every_form
def test_a_text_that_comes_twice_is_stored_once(teacher, text, tmp_path, form) -> None:
    twice = text.select(torch.tensor([0, 1, 0, 1, 2]))
    of_texts(tmp_path, teacher, twice, twice, text, form=form, top_k=5)
    assert sorted(values_of(tmp_path)) == sorted(keys_of(text))


def test_one_text_with_two_values_of_a_field_that_the_teacher_saw_is_stored_twice(teacher, text, tmp_path) -> None:
    same = text.select(torch.tensor([0, 0, 0]))
    items = Item("a", {"rule": "short"}), Item("b", {"rule": "long", "other": "1"}), Item("a", {"rule": "short"})
    cached = of_texts(tmp_path, teacher, replace(same, items=items), fields=["rule"], form="topk", top_k=5)
    assert cached.fields == {"rule"}
    assert len(values_of(tmp_path)) == 2
    cached.rows(replace(same, items=items))
    edited = replace(same.slice(0, 1), items=(Item("a", {"rule": "edited"}),))
    with pytest.raises(ArgumentError, match=r"^path: the text of the item 'a' .* its record has another rule"):
        cached.rows(edited)


def test_hidden_states_that_overflowed_name_the_item_and_the_dtype(teacher, text, tmp_path) -> None:
    teacher.lm.half()
    with torch.no_grad():
        teacher.lm.model.model.norm.weight.fill_(60_000)
    with pytest.raises(
        ValueError, match=r"^teacher: its hidden states for the item '0' are NaN or infinite in torch.float16"
    ):
        of_texts(tmp_path, teacher, text)


@every_form
def test_shards_are_found_by_all_their_texts(teacher, tmp_path, monkeypatch, form) -> None:
    monkeypatch.setattr("lit_distill.teachers.writing.SHARD_BYTES", 0)
    batches = [named(ragged_text(rows=3)) for _ in range(4)]
    cached = of_texts(tmp_path, teacher, *batches, form=form, top_k=5)
    assert len(tensors_of(tmp_path)) == 4
    for batch in reversed(batches):
        if form == "hidden":
            assert torch.equal(all_logits(cached.rows(batch), batch), all_logits(teacher.rows(batch), batch))
        else:
            assert all_logits(cached.rows(batch), batch).shape == (len(batch.target_index), 41)
    joined = Sequences(
        *(torch.cat([getattr(b, n) for b in batches]) for n in ("input_ids", "attention_mask", "target_mask"))
    )
    each = torch.cat([all_logits(cached.rows(batch), batch) for batch in batches])
    assert torch.equal(all_logits(cached.rows(joined), joined), each)


def test_an_unfinished_shard_of_a_killed_run_is_no_part_of_the_cache(teacher, text, tmp_path) -> None:
    of_texts(tmp_path, teacher, text)
    (tmp_path / "shards" / ".0-00001.safetensors.unfinished").write_bytes(b"half of a shard")
    assert num_texts(tmp_path) == 5


def test_a_rank_that_has_the_texts_of_another_writes_none(teacher, text, tmp_path) -> None:
    cached = of_texts(tmp_path, teacher, text)
    more = named(ragged_text())
    copy = CacheWriter(tmp_path, CacheOptions(), teacher, cached.settings, 0, writes=False)
    copy.write(more, copy.missing(more))
    copy.flush()
    assert num_texts(tmp_path) == 5
    assert copy.missing(more) == []  # as for the rank that wrote them


def test_whoever_may_read_the_settings_may_read_the_rest(teacher, text, tmp_path) -> None:
    of_texts(tmp_path, teacher, text)
    assert len({file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()}) == 1


def test_reading_changes_nothing_in_the_folder(teacher, text, tmp_path) -> None:
    cached = of_texts(tmp_path, teacher, text)

    def state() -> dict[str, tuple[int, bytes]]:
        return {
            str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()
        }

    before = state()
    cached.rows(text)
    assert state() == before


def test_more_shards_than_a_process_may_open_files(teacher, tmp_path, monkeypatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("lit_distill.teachers.writing.SHARD_BYTES", 0)
    batches = [named(ragged_text(rows=1, width=6), str(number)) for number in range(60)]
    of_texts(tmp_path, teacher, *batches)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, hard))
    try:
        cached = CachedTeacher(str(tmp_path)).load(None, None)
        rows = [cached.rows(batch) for batch in batches]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(rows) == 60


def test_a_path_may_begin_with_a_tilde_and_have_spaces(teacher, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    of_texts(tmp_path / "my caches" / "ü", teacher, text)
    cached = CachedTeacher("~/my caches/ü").load(None, None)
    assert torch.equal(all_logits(cached.rows(text), text), all_logits(teacher.rows(text), text))


def test_every_key_is_found_among_many_that_begin_alike(teacher, text, tmp_path) -> None:
    of_texts(tmp_path, teacher, text)
    shards = Shards(tmp_path)
    joined = np.array([[5, 9], [5, -3], [5, 0], [-1, 7]])
    order = np.lexsort((joined[:, 1], joined[:, 0]))
    shards._order, shards._first, shards._second = order, joined[order, 0], joined[order, 1]
    found = [shards.find((int(first), int(second))) for first, second in joined]
    assert [place.text for place in found if place] == [0, 1, 2, 3]
    assert shards.find((5, 1)) is None


def test_progress_is_said_after_ever_longer_times(monkeypatch) -> None:
    clock = iter([0.0, 2.0, 6.0, 7.0, 30.0])
    monkeypatch.setattr("lit_distill.teachers.writing.time.monotonic", lambda: next(clock))
    said: list[str] = []
    progress = Progress(10, said.append)
    for _ in range(4):
        progress.add(2)
    assert said == [
        "Teacher cache: 4 of 10 texts after 6 s, about 9 s left.",
        "Teacher cache: 8 of 10 texts after 30 s, about 8 s left.",
    ]


def damaged(folder: Path, how: str) -> None:
    settings = json.loads((folder / "cache.json").read_text())
    if how == "no settings":
        (folder / "cache.json").unlink()
    elif how == "unfinished":
        (folder / "cache.json").write_text(json.dumps({**settings, "complete": False}))
    elif how == "half of the settings":
        (folder / "cache.json").write_text(json.dumps(settings)[:100])
    elif how == "a list":
        (folder / "cache.json").write_text("[1]")
    elif how == "a later version":
        (folder / "cache.json").write_text(json.dumps({**settings, "version": 2, "what_it_adds": 3}))
    elif how == "half of a shard":
        shard = next((folder / "shards").iterdir())
        shard.write_bytes(shard.read_bytes()[:500])
    else:
        (folder / "head.safetensors").unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no settings", r"holds no cache.json, so it is no teacher cache. Write one with `lit-distill cache"),
        ("unfinished", r"is not finished. Run its `lit-distill cache` command again: it goes on where it stopped"),
        ("half of the settings", r"cache.json cannot be read \(.*\). Write the cache again"),
        ("a list", r"cache.json cannot be read \(.*\). Write the cache again"),
        ("a later version", r"has version 2 of the format, expected 1"),
        (
            "half of a shard",
            r"0-00000.safetensors cannot be read .*or delete this file and run the `lit-distill cache` command",
        ),
        ("no head", r"head.safetensors cannot be read"),
    ],
)
def test_a_damaged_cache_is_refused_with_its_key_and_file(teacher, text, tmp_path, how, words) -> None:
    of_texts(tmp_path, teacher, text)
    damaged(tmp_path, how)
    with pytest.raises(ValueError, match=rf"^path: .*{words}"):
        CachedTeacher(str(tmp_path)).load(None, None)


def test_tail_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="tail: expected 'spread' or 'renormalize', got 'spreed'"):
        CachedTeacher("somewhere", "spreed")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "tail", "accuracy"),
    [
        ("hidden", "spread", "exact"),
        ("topk", "spread", "spread"),
        ("topk", "renormalize", "truncated"),
        ("sampled", "spread", "drawn"),
    ],
)
def test_the_form_tells_how_accurate_it_is(teacher, text, tmp_path, form, tail, accuracy) -> None:
    of_texts(tmp_path, teacher, text, form=form, top_k=5)
    assert CachedTeacher(str(tmp_path), tail).accuracy == accuracy
