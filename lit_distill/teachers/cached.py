"""A teacher whose predictions were computed once and lie on the disk: its weights are not opened, and its body never runs.

======== ==================================== =========================================== =========================
form     stored for each target               logits                                      objectives
======== ==================================== =========================================== =========================
hidden   its hidden state; the LM head once   exact                                       all
topk     k ids with their log-probability     exact for k tokens; the tail is spread      all; biased by the tail
sampled  num_draws tokens and their counts    log of the frequencies; unbiased on average linear in the teacher only
======== ==================================== =========================================== =========================

Sources: hidden states as in Nitrobrew; draws with replacement as in Anshumann et al. 2025, https://arxiv.org/abs/2503.16870, with
proposal temperature 1, for which the importance weights are 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_distill.data.encoding import tokenizer_content
from lit_distill.functional import bits_for, unpack_bits
from lit_distill.functional.host import to_device
from lit_distill.models.lm_head import LMHead
from lit_distill.objectives import Accuracy
from lit_distill.teachers.base import Opening, Teacher, TeacherRows
from lit_distill.teachers.local import HiddenRows
from lit_distill.teachers.sparse import DrawnRows, Tail, TopKRows
from lit_distill.teachers.store import HEAD, CacheSettings, Place, Shards, Text, open_tensors, texts_of
from lit_distill.types import ArgumentError, arguments_of

if TYPE_CHECKING:
    from lit_distill.models import CausalLM
    from lit_distill.types import Sequences

COUNT_BITS = 6
"""Bits of the count of a drawn token, behind those of its id."""


class CachedTeacher(Teacher):
    """A teacher cache that ``lit-distill cache`` wrote, for data, tokenizer and template as they were then.

    Args:
        path: folder of the cache.
        tail: of a cache of form ``topk``: spread the probability that the k tokens leave evenly over the other tokens, or
            "renormalize" the k. Both bias the student; with the second it learns that the other tokens never follow.
    """

    answers_generated = False

    def __init__(self, path: str, tail: Tail = "spread") -> None:
        if tail not in ("spread", "renormalize"):
            raise ValueError(f"tail: expected 'spread' or 'renormalize', got {tail!r}.")
        self.path = Path(path).expanduser()
        self.tail = tail
        self._settings: CacheSettings | None = None
        self._shards: Shards | None = None
        self._head: LMHead | None = None  # in the dtype of the teacher
        self._ready: LMHead | None = None  # on the device of the texts, in the dtype in which it multiplies there

    @property
    def settings(self) -> CacheSettings:
        """What ``cache.json`` says.

        Raises:
            ArgumentError: beginning with ``path``, if there is no complete cache.
        """
        if self._settings is None:
            with arguments_of(self):
                settings = CacheSettings.read(self.path, "path")
            if not settings.complete:
                raise ArgumentError(
                    self,
                    f"path: the cache {self.path} is not finished. Run its `lit-distill cache` command again: it goes on where it "
                    "stopped.",
                )
            self._settings = settings
        return self._settings

    @property
    def accuracy(self) -> Accuracy:  # type: ignore[override]
        """That of the form."""
        if self.settings.form == "hidden":
            return "exact"
        if self.settings.form == "sampled":
            return "drawn"
        return "spread" if self.tail == "spread" else "truncated"

    @property
    def known_tokens(self) -> int | None:
        """Those that were stored."""
        return self.settings.top_k if self.settings.form == "topk" else None

    @property
    def fields(self) -> frozenset[str]:
        """Those that the teacher saw when it was written; with others, a text is not found."""
        return frozenset(self.settings.fields)

    def open(self, opening: Opening, key: str) -> int | None:
        """Compare the tokenizer; the index of the texts is read by `load`."""
        settings = self.settings
        if tokenizer_content(opening.tokenizer) != settings.tokenizer:
            raise ArgumentError(
                self,
                f"path: the cache {self.path} was written with another tokenizer or chat template than the student's. Write it "
                "again with this student, or set model.student.tokenizer to the one it was written with.",
            )
        if settings.vocabulary_size > opening.student_rows:
            raise ArgumentError(
                self,
                f"path: the cache {self.path} is about {settings.vocabulary_size} tokens, but the student's head has only "
                f"{opening.student_rows} rows. Write it again with this student.",
            )
        return settings.vocabulary_size

    def load(self, vocabulary_size: int | None, student: CausalLM | None) -> CachedTeacher:
        """Read the index of the texts, and the head of hidden states."""
        settings = self.settings
        with arguments_of(self):
            self._shards = Shards(self.path)
        size = vocabulary_size or settings.vocabulary_size
        if size < settings.vocabulary_size and settings.form != "hidden":
            raise ValueError(
                f"teacher: the cache {self.path} is about {settings.vocabulary_size} tokens, but another teacher shares only "
                f"{size} with the student. Write it with form: hidden."
            )
        if settings.form == "hidden":
            # safetensors puts what it reads on the device in whose context it is called, as Lightning calls this
            with torch.device("cpu"), arguments_of(self), open_tensors(self.path / HEAD) as file:
                tensors = {name: file.get_slice(name)[:size] for name in file.keys()}  # noqa: SIM118 - it is no mapping
            self._head = LMHead(tensors["weight"], tensors.get("bias"), settings.scale, settings.softcap)
            self._ready = None
        rank_zero_info(
            f"Teacher cache {self.path}: {len(self._shards)} texts, {self._shards.total_rows} tokens of {settings.teacher}; "
            f"{self._bias()}."
        )
        return self

    def _bias(self) -> str:
        settings = self.settings
        if settings.form == "topk":
            rest = "spread evenly over the others" if self.tail == "spread" else "left out"
            return (
                f"the {settings.top_k} most probable tokens are exact, and the rest is {rest}, which biases the student"
            )
        if settings.form == "sampled":
            return f"{settings.num_draws} draws: the gradient is unbiased, the value of the loss is not"
        return "exact"

    def rows(self, sequences: Sequences) -> TeacherRows:
        """The stored rows of all targets.

        Raises:
            ArgumentError: beginning with ``path`` and naming the item, if its text is not in the cache.
        """
        assert self._shards is not None
        device = sequences.input_ids.device
        places = []
        for text in texts_of(sequences, self.settings.fields):
            if not text.targets.any():
                continue
            place = self._shards.find(text.key)
            if place is None:
                raise ArgumentError(self, self._missing(text, known=bool(sequences.items)))
            places.append(place)
        labels = sequences.input_ids.flatten()[sequences.target_index]
        return self._gather(places, labels, device)

    def _missing(self, text: Text, known: bool) -> str:
        assert self._shards is not None
        why = self._shards.explain(text, self.settings.fields)
        if not known:
            return (
                f"path: the cache {self.path} has the items of the data, but not the rows of a corpus. Give "
                "model.corpus_objectives only objectives that need no teacher, such as NextToken, or set model.teacher.path."
            )
        return (
            f"path: the text of the item {text.name!r} is not in the cache {self.path}: {why}. It was "
            f"written for: {self.settings.data}. Give the same data and lengths, or run the `lit-distill cache` command again "
            "with these: it adds what is missing, also of further splits, such as --splits '[train, validation, test]'."
        )

    def _gather(self, places: list[Place], labels: Tensor, device: torch.device) -> TeacherRows:
        settings = self.settings

        def stored(name: str) -> Tensor:
            assert self._shards is not None
            parts = [self._shards.values(name, place.shard, place.start, place.stop) for place in places]
            return torch.cat(parts) if parts else self._empty(name)

        if settings.form == "hidden":
            return HiddenRows(to_device(stored("hidden"), device), self._head_on(device))
        bits, size = bits_for(settings.vocabulary_size), settings.vocabulary_size
        if settings.form == "topk":
            packed, logprobs = to_device(stored("ids"), device), to_device(stored("logprobs"), device).float()
            exact = to_device(stored("label_logprobs"), device).float()
            return TopKRows(unpack_bits(packed, settings.top_k, bits), logprobs, labels, exact, size, self.tail)
        return self._draws(places, device, bits)

    def _draws(self, places: list[Place], device: torch.device, bits: int) -> DrawnRows:
        assert self._shards is not None
        sizes, values = [], []
        for shard, start, stop, text in places:
            sizes.append(self._shards.values("sizes", shard, start, stop).long())
            ends = self._shards.values("draw_ends", shard, max(text - 1, 0), text + 1).tolist()
            values.append(self._shards.values("draws", shard, ends[0] if text else 0, ends[-1]))
        width = -(-(bits + COUNT_BITS) // 8)
        packed = torch.cat([torch.zeros(0, width, dtype=torch.uint8), *values])
        drawn = unpack_bits(packed, 1, bits + COUNT_BITS)[:, 0] if len(packed) else torch.zeros(0, dtype=torch.int64)
        offsets = F.pad(torch.cat([torch.zeros(0, dtype=torch.int64), *sizes]).cumsum(0), (1, 0))
        settings = self.settings
        return DrawnRows(
            offsets,
            to_device(drawn >> COUNT_BITS, device),
            to_device(drawn & (2**COUNT_BITS - 1), device),
            settings.num_draws,
            settings.vocabulary_size,
        )

    def _empty(self, name: str) -> Tensor:
        settings = self.settings
        packed = -(-settings.top_k * bits_for(settings.vocabulary_size) // 8)
        shape = {"hidden": (0, settings.hidden_size), "ids": (0, packed), "logprobs": (0, settings.top_k)}.get(
            name, (0,)
        )
        dtype = torch.uint8 if name == "ids" else getattr(torch, settings.dtype) if name == "hidden" else torch.float32
        return torch.zeros(shape, dtype=dtype)

    def _head_on(self, device: torch.device) -> LMHead:
        """The head as a local teacher multiplies it on this device: a CPU may need another dtype than a GPU."""
        assert self._head is not None
        if self._ready is None or self._ready.weight.device != device:
            bias = None if self._head.bias is None else self._head.bias.to(device)
            self._ready = self._head._replace(weight=self._head.weight.to(device), bias=bias).for_products()
        return self._ready

    def identity(self, key: str) -> dict[str, Any]:
        """That of the teacher that wrote it, so that a run may go on with its cache."""
        return self.settings.identity

    @property
    def description(self) -> str:
        """The teacher that wrote it, and the form."""
        return f"{self.settings.teacher} (cache, {self.settings.form})"
