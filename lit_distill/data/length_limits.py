"""Drops or truncates items that are longer than the limits, and counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import datasets
import numpy as np

from lit_distill.types import check_sizes

T = TypeVar("T")


@dataclass(frozen=True)
class LengthLimits:
    """The longest prompt and item allowed, in tokens, and what happens to longer ones.

    Args:
        max_prompt_length: tokens of the prompt, with BOS.
        max_length: tokens of prompt and response together, with EOS.
        overlong: "drop" removes the item; "truncate" removes tokens from the beginning of the prompt (BOS is kept) and
            from the end of the response (EOS is lost).
    """

    max_prompt_length: int
    max_length: int
    overlong: Literal["drop", "truncate"]

    def __post_init__(self) -> None:
        check_sizes(max_prompt_length=self.max_prompt_length)
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length: {self.max_prompt_length} must be less than "
                f"max_length ({self.max_length}): the response needs room."
            )
        if self.overlong not in {"drop", "truncate"}:
            raise ValueError(f"overlong: expected 'drop' or 'truncate', got {self.overlong!r}.")

    def cut(self, prompt: list[T], response: list[T], kept: int) -> tuple[list[T], list[T]]:
        """Prompt and response, truncated to the limits; items that are short enough are returned unchanged.

        Args:
            prompt: token ids, or other values of each token.
            response: token ids with EOS, or other values of each token; may be empty.
            kept: number of tokens at the start of the prompt that are never removed.
        """
        if len(prompt) > self.max_prompt_length:
            kept = min(kept, self.max_prompt_length - 1)
            prompt = prompt[:kept] + prompt[len(prompt) - (self.max_prompt_length - kept) :]
        return prompt, response[: self.max_length - len(prompt)]


def fit_lengths(rows: datasets.Dataset, split: str, limits: LengthLimits) -> tuple[datasets.Dataset, np.ndarray, str]:
    """The remaining rows, the number of tokens of each after truncation, and one line that reports what was removed.

    Raises:
        ValueError: if no row remains.
    """
    prompts = _numbers(rows, "num_prompt_tokens")
    responses = _numbers(rows, "num_tokens") - prompts
    long_prompt = prompts > limits.max_prompt_length
    long_total = ~long_prompt & (prompts + responses > limits.max_length)
    if limits.overlong == "drop":
        stays = ~long_prompt & ~long_total
    else:
        stays = np.ones(len(prompts), dtype=bool)
        long_total |= np.minimum(prompts, limits.max_prompt_length) + responses > limits.max_length
    lengths = np.minimum(np.minimum(prompts, limits.max_prompt_length) + responses, limits.max_length)[stays]

    report = f"{split}: {int(stays.sum())} items"
    num_changed = int((long_prompt | long_total).sum())
    if num_changed:
        reasons = [
            f"{int(count.sum())} with {what} over {limit} tokens ({name})"
            for count, what, limit, name in (
                (long_prompt, "the prompt", limits.max_prompt_length, "max_prompt_length"),
                (long_total, "prompt and response", limits.max_length, "max_length"),
            )
            if count.any()
        ]
        report += f", {num_changed} {'dropped' if limits.overlong == 'drop' else 'cut'}: {', '.join(reasons)}"
    if not stays.any():
        raise ValueError(
            f"{report}. None of the {len(prompts)} items is left: raise the limit, or set overlong to 'truncate'."
        )
    return (rows if stays.all() else rows.select(np.flatnonzero(stays))), lengths, report


def longest_prompt(rows: datasets.Dataset, limits: LengthLimits) -> int:
    """Number of tokens of the longest prompt, after truncation to the limit."""
    return min(int(_numbers(rows, "num_prompt_tokens").max(initial=0)), limits.max_prompt_length)


def num_learnt_tokens(rows: datasets.Dataset, lengths: np.ndarray, limits: LengthLimits) -> int:
    """Number of tokens that are learnt, or more if some of them are cut off.

    Args:
        rows: of `FEATURES`.
        lengths: ``[rows]`` tokens of each item, after truncation.
        limits: that the prompts are truncated to.
    """
    prompts = np.minimum(_numbers(rows, "num_prompt_tokens"), limits.max_prompt_length)
    parts = [
        part["targets"].combine_chunks() for part in rows.select_columns(["targets"]).with_format("arrow").iter(100_000)
    ]
    spans = np.concatenate([np.zeros(0, dtype=np.int64), *(part.flatten().to_numpy() for part in parts)])
    marked = np.concatenate([np.zeros(0, dtype=bool), *(part.value_lengths().to_numpy() > 0 for part in parts)])
    return int((spans[1::2] - spans[::2]).sum()) + int((lengths - prompts)[~marked].clip(min=0).sum())


def _numbers(rows: datasets.Dataset, column: str) -> np.ndarray:
    """``[rows]`` int64: a column of numbers."""
    parts = rows.select_columns([column]).with_format("numpy").iter(100_000)
    return np.concatenate([np.zeros(0, dtype=np.int64), *(part[column] for part in parts)]).astype(np.int64)
