"""The files of a teacher cache: what a teacher predicts at the target positions of texts, found by the content of a text.

A cache is a folder::

    cache.json            form, sizes, teacher and tokenizer
    head.safetensors      form hidden only: the LM head
    shards/0-00000.safetensors, …   rank and number: the texts, and a row of values for every target

A text is found by a hash of its token ids, its targets and the fields of its record that the teacher saw, not by the id of its
item: ids may be used twice, the same text has the same rows in every split, and a text that was altered is not found. Its item's id
is stored for messages.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_distill.files import atomic_write, write_text

if TYPE_CHECKING:
    from lit_distill.types import Sequences

VERSION = 1
Form = Literal["hidden", "topk", "sampled"]
SETTINGS, HEAD, SHARDS = "cache.json", "head.safetensors", "shards"


@dataclass(frozen=True)
class CacheSettings:
    """What is said of a cache in ``cache.json``."""

    form: Form
    vocabulary_size: int
    """V: the ids, counted from 0, that the values are about."""
    teacher: str
    """Description of the teacher."""
    identity: dict[str, Any]
    """Of the teacher, to be compared when a run is resumed."""
    tokenizer: str
    """A digest of the tokenizer of the texts."""
    data: str
    """How the texts were made, for messages."""
    dtype: str = "float32"
    """Of the hidden states."""
    hidden_size: int = 0
    top_k: int = 0
    num_draws: int = 0
    seed: int = 0
    """Of the draws."""
    fields: list[str] = field(default_factory=list)
    """Fields of the records that the teacher saw, sorted."""
    scale: float = 1.0
    """Of the logits; see `LMHead`."""
    softcap: float | None = None
    version: int = VERSION
    complete: bool = False
    """Whether all texts were written."""

    @classmethod
    def read(cls, folder: Path, key: str) -> CacheSettings:
        """Read the settings of a cache.

        Raises:
            ValueError: naming ``key``, if there is no cache or another version wrote it.
        """
        file = folder / SETTINGS
        if not file.is_file():
            raise ValueError(
                f"{key}: {folder} holds no {SETTINGS}, so it is no teacher cache. Write one with `lit-distill cache --config ... "
                f"--path {folder}`."
            )
        try:
            values = dict(json.loads(file.read_text(encoding="utf-8")))
            known = cls(**values) if values.get("version") == VERSION else None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: {file} cannot be read ({error}). Write the cache again.") from error
        if known is None:
            raise ValueError(
                f"{key}: {folder} has version {values.get('version')} of the format, expected {VERSION}. Write the cache again, or "
                "use the version of lit-distill that wrote it."
            )
        return known

    def write(self, folder: Path) -> None:
        """Write the settings."""
        write_text(folder / SETTINGS, json.dumps(asdict(self), indent=1))


class Text(NamedTuple):
    """A text of a batch: where it is found, and what it is."""

    key: tuple[int, int]
    """Hash of tokens, targets and fields."""
    name: str
    """Id of its item, or its place in the batch."""
    tokens: np.ndarray
    """[T] int32."""
    targets: np.ndarray
    """[T] bool."""


def encoded(name: str) -> bytes:
    """A name as bytes; a lone surrogate, which UTF-8 does not have, becomes a question mark."""
    return name.encode(errors="replace")


def texts_of(sequences: Sequences, fields: Sequence[str] = ()) -> Iterator[Text]:
    """The texts of a batch, without padding.

    Args:
        sequences: the batch.
        fields: fields of the records that are a part of the key.
    """
    tokens = sequences.tokens_on_host.numpy().astype(np.int32)
    attended, targets = sequences.masks.attended.numpy(), sequences.masks.targets.numpy()
    for row in range(len(tokens)):
        here = tokens[row][attended[row]]
        learnt = targets[row][attended[row]]
        content = here.tobytes() + b"|" + learnt.tobytes()
        if fields:
            known = sequences.items[row].fields if sequences.items else {}
            content += json.dumps([known.get(name) for name in fields]).encode()
        code = hashlib.blake2b(content, digest_size=16).digest()
        name = sequences.items[row].id if sequences.items else f"text {row} of the batch"
        first, second = np.frombuffer(code, dtype=np.int64)
        yield Text((int(first), int(second)), name, here, learnt)


def open_tensors(file: Path) -> Any:
    """Open a safetensors file of a cache.

    Raises:
        ValueError: beginning with ``path``, if it is not whole.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"path: {file} cannot be read ({error}). Copy the cache again; or delete this file and run the `lit-distill cache` "
            "command again, which writes what is missing."
        ) from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor], settings: Path) -> None:
    """Write a safetensors file atomically; whoever may read ``settings`` may read it: safetensors lets its owner alone."""

    def write(path: Path) -> None:
        save_file(dict(tensors), path)
        shutil.copymode(settings, path)

    atomic_write(file, write)


def write_shard(
    file: Path, texts: Sequence[Text], values: Mapping[str, Tensor], row_values: Mapping[str, Tensor]
) -> None:
    """Write the texts of a shard and the values of their targets, atomically.

    Args:
        file: the shard.
        texts: in the order of their rows.
        values: ``[R, ...]`` each, for the R targets of all texts.
        row_values: further tensors, such as the ragged values of draws.
    """
    names = [encoded(text.name) for text in texts]
    tensors = {
        "keys": torch.tensor([text.key for text in texts], dtype=torch.int64),
        "names": torch.frombuffer(bytearray(b"".join(names) or b"\0"), dtype=torch.uint8),
        "name_sizes": torch.tensor([len(name) for name in names], dtype=torch.int32),
        "tokens": torch.from_numpy(np.concatenate([text.tokens for text in texts])),
        "targets": torch.from_numpy(np.packbits(np.concatenate([text.targets for text in texts]))),
        "num_tokens": torch.tensor([len(text.tokens) for text in texts], dtype=torch.int32),
        "num_rows": torch.tensor([int(text.targets.sum()) for text in texts], dtype=torch.int32),
        **{name: value.contiguous() for name, value in {**values, **row_values}.items()},
    }
    write_tensors(file, tensors, file.parent.parent / SETTINGS)


class Place(NamedTuple):
    """Where the rows of a text are."""

    shard: int
    start: int
    stop: int
    text: int
    """Its number in the shard."""


class Shards:
    """The shards of a cache, read as far as they are asked for.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.files = sorted((folder / SHARDS).glob("*.safetensors"))
        self._opened: dict[int, Any] = {}
        keys, self.num_rows = [], []
        for index in range(len(self.files)):
            here = self._open(index)
            keys.append(here.get_tensor("keys").numpy().reshape(-1, 2))
            self.num_rows.append(here.get_tensor("num_rows").numpy().astype(np.int64))
        sizes = np.array([len(rows) for rows in self.num_rows], dtype=np.int64)
        self._first_text = np.cumsum(sizes) - sizes
        joined = np.concatenate([np.zeros((0, 2), dtype=np.int64), *keys])
        self._order = np.lexsort((joined[:, 1], joined[:, 0]))
        self._first, self._second = joined[self._order, 0], joined[self._order, 1]
        self._shard = np.repeat(np.arange(len(sizes)), sizes)
        starts = [np.cumsum(rows) - rows for rows in self.num_rows]
        self._start = np.concatenate([np.zeros(0, dtype=np.int64), *starts])
        self._rows = np.concatenate([np.zeros(0, dtype=np.int64), *self.num_rows])

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def total_rows(self) -> int:
        """Number of targets over all texts."""
        return int(self._rows.sum())

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(file.stat().st_size for file in self.files)

    def find(self, key: tuple[int, int]) -> Place | None:
        """Where the rows of a text are; None if it is not in the cache."""
        low = int(np.searchsorted(self._first, key[0], "left"))
        high = int(np.searchsorted(self._first, key[0], "right"))
        at = low + int(np.searchsorted(self._second[low:high], key[1], "left"))
        if at >= high or self._second[at] != key[1]:
            return None
        text = int(self._order[at])
        start, shard = int(self._start[text]), int(self._shard[text])
        return Place(shard, start, start + int(self._rows[text]), text - int(self._first_text[shard]))

    def values(self, name: str, shard: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor of a shard; only these are read."""
        rows: Tensor = self._open(shard).get_slice(name)[start:stop]
        return rows

    def explain(self, text: Text, fields: Sequence[str] = ()) -> str:
        """Why a text is not in the cache: how it differs from the most similar one of an item with its id, if there is one.

        Args:
            text: the text.
            fields: fields of the records that are a part of the key.
        """
        named = [self._text(*place) for place in self._named(text.name)]
        if not named:
            return "the cache was not written for it"
        stored = min(named, key=lambda tokens: _distance(tokens, text.tokens))
        if len(stored) != len(text.tokens):
            return f"it has {len(text.tokens)} tokens now and had {len(stored)} when the cache was written"
        if (places := np.flatnonzero(stored != text.tokens)).size:
            at = int(places[0])
            return f"its token {at} is {int(text.tokens[at])} now and was {int(stored[at])} when the cache was written"
        others = f", or its record has another {' or '.join(fields)}" if fields else ""
        return f"its tokens are those in the cache, but other ones of them are learnt now{others}"

    def _text(self, shard: int, number: int) -> np.ndarray:
        """The tokens of a text, ``[T]``."""
        here = self._open(shard)
        sizes = here.get_tensor("num_tokens").numpy()
        stop = int(sizes[: number + 1].sum())
        tokens: np.ndarray = here.get_slice("tokens")[stop - int(sizes[number]) : stop].numpy()
        return tokens

    def _named(self, name: str) -> Iterator[tuple[int, int]]:
        for index in range(len(self.files)):
            here = self._open(index)
            ends = np.cumsum(here.get_tensor("name_sizes").numpy())
            names, wanted = here.get_tensor("names").numpy().tobytes(), encoded(name)
            for number, stop in enumerate(ends.tolist()):
                if names[stop - int(ends[number] - (ends[number - 1] if number else 0)) : stop] == wanted:
                    yield index, number

    def _open(self, index: int) -> Any:
        if index not in self._opened:
            self._opened[index] = open_tensors(self.files[index])
        return self._opened[index]

    @cached_property
    def keys(self) -> set[tuple[int, int]]:
        """The keys of all texts."""
        return set(zip(self._first.tolist(), self._second.tolist(), strict=True))


def _distance(stored: np.ndarray, now: np.ndarray) -> int:
    """By how many tokens two texts differ."""
    both = min(len(stored), len(now))
    return int((stored[:both] != now[:both]).sum()) + max(len(stored), len(now)) - both
