from __future__ import annotations

import datasets
import pytest

from lit_distill.data import LengthLimits
from lit_distill.data.length_limits import fit_lengths
from lit_distill.data.rows import FEATURES

EOS, BOS = 0, 1


def rows(*sizes: tuple[int, int]) -> datasets.Dataset:
    """Items of the given prompt and response lengths; ids count up from 10, the response ends with EOS."""
    found = [
        {
            "id": str(n),
            "prompt_ids": list(range(10, 10 + prompt)),
            "response_ids": [*range(50, 49 + response), EOS],
            "targets": [],
            "num_prompt_tokens": prompt,
            "num_tokens": prompt + response,
            "num_prefix_tokens": 0,
            "references": ["all of it"],
            "prompt_text": "p",
            "fields": "",
        }
        for n, (prompt, response) in enumerate(sizes)
    ]
    return datasets.Dataset.from_list(found, features=FEATURES)


def test_drop_removes_long_items_and_counts_them_by_reason():
    kept, lengths, report = fit_lengths(
        rows((4, 4), (5, 2), (4, 5), (2, 2), (9, 9)), "train", LengthLimits(4, 8, "drop")
    )
    assert kept["id"][:] == ["0", "3"]
    assert lengths.tolist() == [8, 4]
    assert report == (
        "train: 2 items, 3 dropped: 2 with the prompt over 4 tokens (max_prompt_length), "
        "1 with prompt and response over 8 tokens (max_length)"
    )


def test_truncate_keeps_every_item_and_counts_what_it_cut():
    kept, lengths, report = fit_lengths(rows((4, 4), (5, 2), (4, 5), (9, 9)), "test", LengthLimits(4, 8, "truncate"))
    assert len(kept) == 4
    assert lengths.tolist() == [8, 6, 8, 8]
    assert "4 items, 3 cut: 2 with the prompt over 4 tokens" in report
    assert "2 with prompt and response over 8 tokens" in report


def test_nothing_too_long_is_reported_as_such():
    assert fit_lengths(rows((4, 4)), "train", LengthLimits(4, 8, "drop"))[2] == "train: 1 items"


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match=r"None of the 2 items is left: raise the limit, or set overlong"):
        fit_lengths(rows((9, 9), (5, 5)), "train", LengthLimits(4, 8, "drop"))


def test_a_long_prompt_loses_its_beginning_but_not_its_bos():
    limits = LengthLimits(4, 8, "truncate")
    assert limits.cut([10, 11, 12, 13, 14, 15], [50, EOS], kept=0) == ([12, 13, 14, 15], [50, EOS])
    assert limits.cut([BOS, 11, 12, 13, 14, 15], [50, EOS], kept=1) == ([BOS, 13, 14, 15], [50, EOS])


def test_a_long_response_loses_its_end_with_its_eos():
    limits = LengthLimits(4, 8, "truncate")
    assert limits.cut([10, 11, 12, 13], [50, 51, 52, 53, EOS], kept=0) == ([10, 11, 12, 13], [50, 51, 52, 53])
    assert limits.cut([10], [50, EOS], kept=0) == ([10], [50, EOS])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [((8, 8, "drop"), "max_prompt_length"), ((0, 8, "drop"), "max_prompt_length"), ((4, 8, "cut"), "overlong")],
)
def test_limits_that_cannot_be_name_their_key(arguments, key):
    with pytest.raises(ValueError, match=rf"^{key}"):
        LengthLimits(*arguments)
