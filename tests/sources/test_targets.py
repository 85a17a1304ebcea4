"""Which tokens of a text are learnt: the first ones, none of some tokens, none between two marks."""

from __future__ import annotations

import pytest
import torch
from tiny import ASSETS
from training import learner_of, quiet_trainer, weights

from lit_distill.data import ProceduralData
from lit_distill.models import ModelSpec, load_tokenizer
from lit_distill.module import DistillationModule
from lit_distill.objectives import DirectPreference, ForwardKL, NextToken
from lit_distill.sources import ResponsePairs, TargetFilter
from lit_distill.teachers import CachedTeacher
from lit_distill.types import Pairs, Sequences

OPEN, CLOSE, END, PAD = "<think>", "</think>", "<|end|>", "<|pad|>"


class Words:
    """A tokenizer of a few tokens."""

    all_special_ids = (0, 1)

    def get_vocab(self) -> dict[str, int]:
        return {PAD: 0, END: 1, OPEN: 2, CLOSE: 3, **{letter: 4 + n for n, letter in enumerate("abcdef")}}


def text_of(*rows: tuple[int, list[str]]) -> Sequences:
    """Rows of tokens, of which the first so many are the prompt; padded on the right."""
    ids, width = Words().get_vocab(), max(len(tokens) for _, tokens in rows)
    columns = torch.arange(width)
    attended = columns < torch.tensor([[len(tokens)] for _, tokens in rows])
    return Sequences(
        torch.tensor([[ids[t] for t in tokens] + [0] * (width - len(tokens)) for _, tokens in rows]),
        attended.long(),
        attended & (columns >= torch.tensor([[prompt] for prompt, _ in rows])),
    )


def learnt(settings: TargetFilter, *rows: tuple[int, list[str]]) -> list[str]:
    text = text_of(*rows)
    kept = settings.apply(text, Words()).target_mask
    names = {number: name for name, number in Words().get_vocab().items()}
    return [" ".join(names[int(i)] for i in ids[mask]) for ids, mask in zip(text.input_ids, kept, strict=True)]


TWO = ((1, ["a", "b", "c", "d", END]), (2, ["a", OPEN, "b", CLOSE, "c", END]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["b c d <|end|>", "b </think> c <|end|>"]),
        ({"first_tokens": 2}, ["b c", "b </think>"]),
        ({"first_tokens": 99}, ["b c d <|end|>", "b </think> c <|end|>"]),
        ({"skip_special_tokens": True}, ["b c d", "b </think> c"]),
        ({"skip_tokens": [CLOSE, "c"]}, ["b d <|end|>", "b <|end|>"]),
        ({"skip_between": {OPEN: CLOSE}}, ["b c d <|end|>", "c <|end|>"]),  # it opens in the prompt
        ({"first_tokens": 3, "skip_between": {OPEN: CLOSE}}, ["b c d", "c"]),  # of the response, not of what is left
    ],
)
def test_what_is_learnt(settings, expected) -> None:
    assert learnt(TargetFilter(**settings), *TWO) == expected


def test_without_its_end_everything_after_the_mark_is_left_out() -> None:
    settings = TargetFilter(skip_between={OPEN: CLOSE})
    assert learnt(settings, (1, ["a", "b", OPEN, "c", END]), (1, ["a", OPEN, "b", CLOSE, "c", OPEN, "d"])) == ["b", "c"]


def test_a_pair_of_which_one_response_keeps_nothing_has_no_targets() -> None:
    chosen, rejected = text_of((1, ["a", "b"]), (1, ["a", "b"])), text_of((1, ["a", "c", END]), (1, ["a", "b", END]))
    kept = TargetFilter(skip_tokens=["c", END]).apply(Pairs(chosen, rejected), Words())
    assert kept.chosen.target_mask.tolist() == [[False, False], [False, True]]
    assert kept.rejected.target_mask.tolist() == [[False, False, False], [False, True, False]]


def test_what_the_host_remembers_is_what_the_text_says() -> None:
    kept = TargetFilter(first_tokens=1).apply(text_of(*TWO), Words())
    assert torch.equal(kept.masks.targets, kept.target_mask)
    assert len(kept.target_index) == 2


def test_a_token_that_the_tokenizer_does_not_have_is_named(pair, tmp_path) -> None:
    module = learner_of(pair, {"kd": ForwardKL()}, targets=TargetFilter(skip_tokens=["<nope>"]))
    with pytest.raises(ValueError, match=r"^targets\.skip_tokens: '<nope>' is not one token"):
        quiet_trainer(tmp_path, 1).fit(module, ProceduralData(8, num_validation=2, num_test=2))


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^first_tokens: expected at least 1, got 0"):
        TargetFilter(first_tokens=0)


@pytest.mark.parametrize("source", [None, ResponsePairs(max_new_tokens=6)], ids=["texts", "pairs"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_run_learns_from_what_is_left_alone(pair, tmp_path, source, micro_batch_size) -> None:
    """One step on the first token of each response is a step on responses of which only that token counts."""
    data = {"num_validation": 2, "num_test": 2, "batch_size": 8}
    objectives = {"ce": NextToken()} if source is None else {"dpkd": DirectPreference(), "ce": NextToken()}
    seen = []

    def trained(**settings):
        module = learner_of(pair, objectives, source, micro_batch_size=micro_batch_size, **settings)
        module_optimize = module._optimize
        module._optimize = lambda text, corpus: (seen.append(text), module_optimize(text, corpus))[1]
        quiet_trainer(tmp_path, 1).fit(module, ProceduralData(8, **data))
        return weights(module)

    whole, first = trained(), trained(targets=TargetFilter(first_tokens=1))
    assert not torch.equal(whole, first)
    for text in (seen[1],) if source is None else (seen[1].chosen, seen[1].rejected):
        assert text.target_mask.sum(dim=-1).tolist() == [1] * 8


def test_the_embedded_tokenizer_knows_its_special_tokens() -> None:
    tokenizer = load_tokenizer(ModelSpec(str(ASSETS / "student")), "student")
    ids = torch.tensor([[5, 6, tokenizer.eos_token_id]])
    text = Sequences(ids, torch.ones_like(ids), torch.tensor([[False, True, True]]))
    kept = TargetFilter(skip_special_tokens=True).apply(text, tokenizer)
    assert kept.target_mask.tolist() == [[False, True, False]]


def test_a_cache_has_all_targets(pair) -> None:
    cached = CachedTeacher("no-such-folder")
    with pytest.raises(ValueError, match=r"^targets: the cache in model\.teacher finds a text by all of its targets"):
        DistillationModule(ModelSpec(str(pair[0])), {"kd": ForwardKL()}, cached, targets=TargetFilter(first_tokens=1))
