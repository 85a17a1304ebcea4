"""Writes a teacher cache: runs the teacher once over all texts of a data module, on any number of ranks.

A text that is in the cache already is left out, so a run that was killed goes on where it stopped, also on another number of ranks.
What is stored of a text depends on the text alone, not on the others of its batch: draws have a seed of their own for each text.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_distill.files import LOCK_FILE, temporary_path
from lit_distill.functional import bits_for, draw, pack_bits, top_k
from lit_distill.models.identity import is_same_model
from lit_distill.models.lm_head import LMHead, chunk_rows_for
from lit_distill.teachers.cached import COUNT_BITS
from lit_distill.teachers.local import HiddenRows
from lit_distill.teachers.store import (
    HEAD,
    SETTINGS,
    SHARDS,
    CacheSettings,
    Form,
    Shards,
    Text,
    texts_of,
    write_shard,
    write_tensors,
)
from lit_distill.types import check_sizes

if TYPE_CHECKING:
    from lit_distill.teachers.base import LoadedTeacher, TeacherRows
    from lit_distill.types import Sequences

SHARD_BYTES = 128 * 2**20
SHARD_SECONDS = 60.0
"""A shard is written when it is this large, or this old; a killed run loses no more."""
MOST_DRAWS = 2**COUNT_BITS - 1


@dataclass(frozen=True)
class CacheOptions:
    """What to store of a teacher.

    Args:
        form: hidden, topk or sampled; see `CachedTeacher`.
        top_k: of form topk: number of tokens at each position.
        num_draws: of form sampled: draws at each position, at most 63.
        seed: of the draws, together with the text.
        dtype: of stored hidden states; None keeps the teacher's.
    """

    form: Form = "hidden"
    top_k: int = 64
    num_draws: int = 50
    seed: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.form not in ("hidden", "topk", "sampled"):
            raise ValueError(f"form: expected hidden, topk or sampled, got {self.form!r}.")
        check_sizes(top_k=self.top_k, num_draws=self.num_draws)
        if self.num_draws > MOST_DRAWS:
            raise ValueError(f"num_draws: expected at most {MOST_DRAWS}, got {self.num_draws}.")

    def bytes_per_row(self, vocabulary_size: int, hidden_size: int, hidden_dtype: torch.dtype) -> float:
        """Bytes of a target, without its text; of draws an upper limit, since tokens that are drawn twice are stored once."""
        bits = bits_for(vocabulary_size)
        if self.form == "hidden":
            return hidden_size * (self.dtype or hidden_dtype).itemsize
        if self.form == "topk":
            return -(-self.top_k * bits // 8) + 2 * self.top_k + 4
        return self.num_draws * -(-(bits + COUNT_BITS) // 8) + 1


class CacheWriter:
    """Writes the texts of one rank into a cache.

    Args:
        folder: of the cache; what is there must have been written with the same settings.
        options: what to store.
        teacher: answers for the texts.
        settings: of the cache.
        rank: index of this process among those that have different texts.
        writes: whether it stores its texts; false if another process has the same ones, as with tensor parallelism.
    """

    def __init__(
        self,
        folder: Path,
        options: CacheOptions,
        teacher: LoadedTeacher,
        settings: CacheSettings,
        rank: int,
        writes: bool = True,
    ) -> None:
        self.folder, self.options, self.teacher, self.settings, self.rank = folder, options, teacher, settings, rank
        self.writes = writes
        self._known = set(Shards(folder).keys)
        self._texts: list[Text] = []
        self._values: list[dict[str, Tensor]] = []
        self._since = time.monotonic()
        self._number = 0

    def missing(self, sequences: Sequences) -> list[int]:
        """The rows of a batch whose texts are not in the cache, each text once."""
        found: dict[tuple[int, int], int] = {}
        for row, text in enumerate(texts_of(sequences, self.settings.fields)):
            if text.targets.any() and text.key not in self._known:
                found.setdefault(text.key, row)
        return list(found.values())

    def write(self, sequences: Sequences, rows: Sequence[int]) -> None:
        """Add some texts of a batch; all ranks call this, since the teacher's forward pass may be a collective.

        Raises:
            ValueError: naming the item, if its hidden states are not finite.
        """
        part = sequences.select(torch.tensor(rows or [0]))
        predicted = self.teacher.rows(part)
        if not rows:
            return
        texts = list(texts_of(part, self.settings.fields))
        self._known.update(text.key for text in texts)
        if self.writes:
            self._texts += texts
            self._values += self._computed(predicted, part, texts)
        size = sum(value.nbytes for values in self._values for value in values.values())
        if size > SHARD_BYTES or time.monotonic() - self._since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the texts that are not on the disk yet as a shard."""
        self._since = time.monotonic()
        if not self._texts:
            return
        joined = {name: torch.cat([values[name] for values in self._values]) for name in self._values[0]}
        row_values = {}
        if self.options.form == "sampled":
            counts = [len(values["draws"]) for values in self._values]
            row_values = {"draws": joined.pop("draws"), "draw_ends": torch.tensor(counts).cumsum(0)}
        while (file := self.folder / SHARDS / f"{self.rank}-{self._number:05d}.safetensors").exists():
            self._number += 1
        write_shard(file, self._texts, joined, row_values)
        self._texts, self._values = [], []

    def _computed(self, rows: TeacherRows, part: Sequences, texts: Sequence[Text]) -> list[dict[str, Tensor]]:
        """What is stored of each text."""
        ends = np.cumsum([int(text.targets.sum()) for text in texts]).tolist()
        places = [slice(start, stop) for start, stop in pairwise([0, *ends])]
        if self.options.form == "hidden":
            return self._hidden(rows, texts, places)
        labels = part.input_ids.flatten()[part.target_index]
        size = chunk_rows_for(rows.head) if isinstance(rows, HiddenRows) else 256
        bits = bits_for(self.settings.vocabulary_size)
        if self.options.form == "topk":
            chunks = _chunks(slice(0, len(labels)), size)
            parts = [self._top_k(rows.logits(chunk), labels[chunk], bits) for chunk in chunks]
            joined = _joined(parts)
            return [{name: values[place] for name, values in joined.items()} for place in places]
        found = []
        for text, place in zip(texts, places, strict=True):
            generator = torch.Generator().manual_seed(self._seed(text))
            found.append(_joined([self._drawn(rows.logits(c), generator, bits) for c in _chunks(place, size)]))
        return found

    def _hidden(self, rows: TeacherRows, texts: Sequence[Text], places: Sequence[slice]) -> list[dict[str, Tensor]]:
        if not isinstance(rows, HiddenRows):
            raise ValueError("form: hidden states are known of a local model only. Choose form: topk or sampled.")
        hidden = rows.hidden.to(self.options.dtype or rows.hidden.dtype).cpu()
        for text, place in zip(texts, places, strict=True):
            if not hidden[place].isfinite().all():
                raise ValueError(
                    f"teacher: its hidden states for the item {text.name!r} are NaN or infinite in {hidden.dtype}. Set "
                    "model.teacher.dtype: float32 or bfloat16."
                )
        return [{"hidden": hidden[place]} for place in places]

    def _top_k(self, logits: Tensor, labels: Tensor, bits: int) -> dict[str, Tensor]:
        ids, logprobs = top_k(logits, self.options.top_k)
        exact = -F.cross_entropy(logits, labels, reduction="none")
        return {"ids": pack_bits(ids, bits), "logprobs": logprobs.bfloat16(), "label_logprobs": exact}

    def _drawn(self, logits: Tensor, generator: torch.Generator, bits: int) -> dict[str, Tensor]:
        draws = draw(logits.cpu(), self.options.num_draws, generator)
        values = (draws.ids << COUNT_BITS | draws.counts)[:, None]
        return {"sizes": draws.sizes.to(torch.uint8), "draws": pack_bits(values, bits + COUNT_BITS)}

    def _seed(self, text: Text) -> int:
        return (self.options.seed * 1_000_003 + text.key[0]) % 2**63


def _chunks(rows: slice, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([values[name] for values in parts]).cpu() for name in parts[0]}


def write_head(folder: Path, head: LMHead) -> None:
    """Write the LM head, in its own dtype."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    write_tensors(folder / HEAD, tensors, folder / SETTINGS)


def prepare(folder: Path, settings: CacheSettings, num_bytes: float) -> CacheSettings:
    """Begin a cache, or go on with the one that is there.

    Args:
        folder: of the cache.
        settings: what will be written.
        num_bytes: how much; of draws at most.

    Returns:
        The settings of the whole cache, with the texts that it had before.

    Raises:
        ValueError: beginning with ``path``, if the folder has a cache of other settings or other files, or the disk is too small.
    """
    found = Shards(folder)
    if (there := check_folder(folder, settings)) is not None:
        settings = replace(settings, data=_both(there.data, settings.data))
    check_space(folder, num_bytes - found.num_bytes, at_most=settings.form == "sampled")
    settings.write(folder)  # not complete until this run ends
    return settings


def check_folder(folder: Path, settings: CacheSettings, unknown: Collection[str] = frozenset()) -> CacheSettings | None:
    """Refuse a folder with other files, or with the texts of another cache.

    Args:
        folder: of the cache.
        settings: what will be written.
        unknown: the settings that are not known yet.

    Returns:
        The settings of the cache that is there; None if it has no texts.

    Raises:
        ValueError: beginning with ``path``.
    """
    left = {LOCK_FILE, temporary_path(folder / SETTINGS).name}  # by a run that was killed as it began
    others = {file.name for file in folder.iterdir()} - left if folder.is_dir() else set()
    if others and not (folder / SETTINGS).is_file():
        raise ValueError(
            f"path: {folder} has other files in it, such as {min(others)}. Give an empty folder, or one that does not exist."
        )
    if not len(Shards(folder)):
        return None
    there = CacheSettings.read(folder, "path")
    one, other = there.identity, json.loads(json.dumps(settings.identity))
    if one != other and not is_same_model(one, other):
        same = there.teacher == settings.teacher
        name = f"{there.teacher} with other weights or prompts" if same else f"{there.teacher}, not {settings.teacher}"
        raise ValueError(
            f"path: the cache {folder} was written with another teacher: {name}. Give that teacher, or another folder."
        )
    for name, now in vars(settings).items():
        before = getattr(there, name)
        if before != now and name not in {"data", "identity", "teacher", "complete", *unknown}:
            given = "another tokenizer" if name == "tokenizer" else f"{name} {before!r}, not {now!r}"
            raise ValueError(
                f"path: the cache {folder} was written with {given}. Give the same settings, or another folder."
            )
    return there


def _both(before: str, now: str) -> str:
    """What a cache was written for, with the newer number of items of each split."""
    parts = {part.rpartition(" of ")[2]: part for part in (*before.split(", "), *now.split(", "))}
    return ", ".join(parts.values())


def check_space(folder: Path, num_bytes: float, at_most: bool) -> None:
    """Refuse a cache that does not fit on the disk.

    Args:
        folder: of the cache.
        num_bytes: what will be written.
        at_most: whether it may be much less, so that a small disk is only warned of.

    Raises:
        ValueError: beginning with ``path``.
    """
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes <= free:
        return
    size, left = f"{num_bytes / 2**30:.1f} GiB", f"{existing} has {free / 2**30:.1f} GiB left"
    if not at_most:
        raise ValueError(
            f"path: the cache takes about {size}, but {left}. Give another disk, or form: topk or sampled."
        )
    rank_zero_warn(f"path: the cache takes at most {size}, but {left}. If the disk is full, the run can go on later.")


class Progress:
    """Says how many texts were written, and how long the rest will take.

    Args:
        total: number of texts of this rank.
        say: gets each line.
    """

    def __init__(self, total: int, say: Callable[[str], None] = rank_zero_info) -> None:
        self.total, self.say = total, say
        self.done, self._began, self._next = 0, time.monotonic(), 5.0

    def add(self, texts: int) -> None:
        """Count texts; a line after 5, 10, 20, … seconds, then at least every 10 minutes."""
        self.done += texts
        seconds = time.monotonic() - self._began
        if seconds >= self._next and self.done:
            left = seconds / self.done * (self.total - self.done)
            self.say(
                f"Teacher cache: {self.done} of {self.total} texts after {seconds:.0f} s, about {left:.0f} s left."
            )
            self._next = seconds + min(600.0, max(seconds, 5.0))
