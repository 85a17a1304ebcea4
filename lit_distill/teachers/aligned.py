"""A teacher with another tokenizer: compared where one token of each covers the same bytes, over the tokens that both have.

The response is tokenised again with the teacher's tokenizer, after the teacher's own prompt. Positions where the two tokenizers
split the text differently are left out; distributions are restricted to the shared tokens and renormalised. Strict one-to-one
alignment: https://arxiv.org/abs/2610.08448; see `lit_distill.teachers.alignment`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_distill.data.collate import pad_sequences
from lit_distill.data.encoding import encode
from lit_distill.functional.host import to_device
from lit_distill.models import ModelSpec, load_tokenizer, validate_specs
from lit_distill.models.build import ModelBuilder
from lit_distill.models.identity import identity_of
from lit_distill.models.lm_head import LMHead
from lit_distill.models.roles import resolve_dtype, warn_of_emulation
from lit_distill.teachers.alignment import (
    Coverage,
    SharedTokens,
    adds_space,
    align,
    end_tokens,
    readable_text,
    shared_tokens,
    token_bytes,
)
from lit_distill.teachers.base import (
    LoadedTeacher,
    Opening,
    PartedRows,
    Prepared,
    RowsPart,
    Teacher,
    TeacherRows,
    require_items,
)
from lit_distill.teachers.local import FrozenTeacher, HiddenRows
from lit_distill.teachers.prompted import PromptTemplate
from lit_distill.types import Sequences, check_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_distill.models import CausalLM

SAID_AFTER = 1_000
"""Targets after which the coverage is logged once."""
MEASURED = 256
"""Rows whose probability of the shared tokens is measured for it."""


class _Pair(NamedTuple):
    """Both tokenizers, and what is known of their tokens."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    shared: SharedTokens
    student_bytes: list[bytes | None]
    teacher_bytes: list[bytes | None]
    ends: dict[int, int]
    spaces: tuple[bool, bool]

    @classmethod
    def of(cls, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> _Pair:
        ours, theirs = token_bytes(student), token_bytes(teacher)
        spaces = adds_space(student, ours), adds_space(teacher, theirs)
        ends = end_tokens(student, teacher)
        return cls(student, teacher, shared_tokens(student, teacher), ours, theirs, ends, spaces)

    @property
    def is_same(self) -> bool:
        """Whether both tokenizers are the same."""
        return torch.equal(self.shared.student_ids, self.shared.teacher_ids) and len(self.shared.student_ids) == len(
            self.student_bytes
        )


class AlignedTeacher(Teacher):
    r"""A local model of another family, with its own tokenizer and prompt. Objectives on single tokens work unchanged.

    Only the first learnt span of a text is aligned: of a conversation, the first answer. What it cannot do: pairs of responses,
    sources in which the teacher generates, and caches.

    Args:
        teacher: the model.
        template: its prompt, a string with fields of the record in braces; ``student_prompt`` is the student's.
        system: if set, a system message in the teacher's chat template; ``template`` is then what the user says. An empty one uses
            the chat template without a system message.
        max_length: most tokens of its prompt and response.
    """

    answers_all = False

    def __init__(
        self,
        teacher: ModelSpec,
        template: str = "{student_prompt}",
        system: str | None = None,
        max_length: int = 2048,
    ) -> None:
        check_sizes(max_length=max_length)
        self.spec = teacher
        self.prompt = PromptTemplate(template, system)
        self.max_length = max_length
        self.coverage = Coverage()
        self._pair: _Pair | None = None
        self._builder: ModelBuilder | None = None
        self._opening: Opening | None = None
        self._key = ""
        self._frozen: FrozenTeacher | None = None
        self._said = False
        self._prepared = Prepared(self._aligned)
        self._shared: SharedTokens | None = None  # on the device of the texts

    @property
    def fields(self) -> frozenset[str]:
        """Those of the prompt."""
        return self.prompt.fields

    def open(self, opening: Opening, key: str) -> int | None:
        """Compare both tokenizers, and log how many tokens they share."""
        validate_specs(opening.student, self.spec, f"{key}.init_args.teacher")
        self.spec = resolve_dtype(self.spec, key, opening.device_type)
        self._opening, self._key = opening, key
        tokenizer = load_tokenizer(self.spec, f"{key}.init_args.teacher")
        self.prompt.check(tokenizer, f"{key}.init_args")
        self._pair = _Pair.of(opening.tokenizer, tokenizer)
        self._builder = ModelBuilder(self.spec, f"{key}.init_args.teacher", None, opening.sharding)
        shared, ours, theirs = (
            len(ids) for ids in (self._pair.shared.student_ids, self._pair.student_bytes, self._pair.teacher_bytes)
        )
        rank_zero_info(
            f"{key}: {shared} tokens are in both tokenizers, of the student's {ours} and the teacher's {theirs}."
        )
        return None

    def load(self, vocabulary_size: int | None, student: CausalLM | None) -> LoadedTeacher:
        """Load the model."""
        assert self._builder is not None
        assert self._opening is not None
        lm = self._builder.finish(None, self._opening.padding_free, frozen=True)
        self._builder = None
        warn_of_emulation(lm, self._key, self._opening.device_type)
        self._frozen = FrozenTeacher(lm)
        return self

    def rows(self, sequences: Sequences) -> TeacherRows:
        """The rows of the aligned targets, over the shared tokens."""
        assert self._frozen is not None
        assert self._pair is not None
        texts, learnt, places = self._prepared.take(sequences)
        total = int(sequences.masks.targets.sum())
        index = torch.tensor([place for row in places for place in row], dtype=torch.int64)
        device = sequences.input_ids.device
        tokens = None if self._pair.is_same else self._shared_on(device).student_ids
        self.coverage.aligned += len(index)
        self.coverage.tokens += total
        if not len(index) and not self._frozen.forward_is_collective:
            return PartedRows([RowsPart(None, index, None, tokens)], total)
        shown = pad_sequences(texts, pad_id=0)
        mask = torch.zeros_like(shown.target_mask)
        for row, positions in enumerate(learnt):
            mask[row, positions] = True
        shown = Sequences(shown.input_ids, shown.attention_mask, mask, items=sequences.items).to(device)
        rows = HiddenRows(self._frozen.target_rows(shown), self._head(device))
        if not self._said and self.coverage.tokens >= SAID_AFTER:
            self._say(rows.hidden)
        return PartedRows([RowsPart(None, index, rows, tokens)], total)

    def num_answered(self, sequences: Sequences) -> int:
        """The number of aligned targets."""
        _, _, places = self._prepared.ahead(sequences)
        return sum(map(len, places))

    def _aligned(
        self, sequences: Sequences
    ) -> tuple[list[tuple[list[int], list[int]]], list[list[int]], list[list[int]]]:
        """Each text in the teacher's tokens, its aligned positions there, and their places among all targets."""
        tokens, masks = sequences.tokens_on_host, sequences.masks
        texts: list[tuple[list[int], list[int]]] = []
        learnt: list[list[int]] = []
        places: list[list[int]] = []
        before = 0
        for row in range(len(sequences)):
            targets = masks.targets[row][masks.attended[row]].tolist()
            if True not in targets:
                texts.append(([0], []))
                learnt.append([])
                places.append([])
                continue
            require_items(sequences, self, self._key)
            first = targets.index(True)
            size = [*targets, False].index(False, first) - first
            response = tokens[row][masks.attended[row]].tolist()[first : first + size]
            prompt, ids, pairs = self._text(sequences, row, response)
            texts.append((prompt, ids))
            learnt.append([len(prompt) + theirs for _, theirs in pairs])
            places.append([before + ours for ours, _ in pairs])
            before += sum(targets)
        return texts, learnt, places

    def _text(
        self, sequences: Sequences, row: int, response: list[int]
    ) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """The teacher's tokens of prompt and response, and the aligned positions of the response in both."""
        assert self._pair is not None
        pair, item = self._pair, sequences.items[row]
        prompt = self.prompt.ids(item, pair.teacher, f"model.{self._key}.init_args")
        if pair.is_same:
            ids, pairs = response, [(place, place) for place in range(len(response))]
        else:
            text, count = readable_text(response, pair.student_bytes, pair.ends, pair.spaces[0])
            ids = encode(pair.teacher, [text])[0]
            last = pair.ends.get(response[count - 1]) if count else None
            if last is not None:
                ids = [*ids, last]
            pairs = align(response[:count], ids, pair.student_bytes, pair.teacher_bytes, pair.ends, pair.spaces)
            shared = pair.shared.student_ids
            found = torch.isin(torch.tensor([response[ours] for ours, _ in pairs], dtype=torch.int64), shared).tolist()
            pairs = [one for one, there in zip(pairs, found, strict=True) if there]
        limit = min(self.max_length, self._frozen.lm.context_length if self._frozen else self.max_length)
        if len(prompt) + len(ids) > limit:
            raise ValueError(
                f"model.{self._key}.init_args.max_length: the text of the item {item.id!r} has {len(prompt) + len(ids)} of the "
                f"teacher's tokens, more than {limit}. Raise it, as far as the teacher's context length allows, or shorten the "
                "data."
            )
        return prompt, ids, pairs

    def _head(self, device: torch.device) -> LMHead:
        assert self._frozen is not None
        assert self._pair is not None
        head = self._frozen.head()
        if self._pair.is_same:
            size = len(self._pair.student_bytes)
            return head._replace(weight=head.weight[:size], bias=None if head.bias is None else head.bias[:size])
        ids = self._shared_on(device).teacher_ids
        return head._replace(weight=head.weight[ids], bias=None if head.bias is None else head.bias[ids])

    def _shared_on(self, device: torch.device) -> SharedTokens:
        if self._shared is None or self._shared.student_ids.device != device:
            assert self._pair is not None
            self._shared = SharedTokens(*(to_device(ids, device) for ids in self._pair.shared))
        return self._shared

    def _say(self, hidden: Tensor) -> None:
        """Log, once, how much of the targets is compared, and of the teacher's probability there."""
        assert self._frozen is not None
        assert self._pair is not None
        self._said = True
        mass = 1.0
        if not self._pair.is_same:
            logits = self._frozen.head().logits(hidden[:MEASURED])
            mass = float(shared_mass(logits, self._pair.shared.teacher_ids.to(logits.device)).mean())
        rank_zero_info(
            f"{self._key}: {self.coverage.share:.1%} of the targets are aligned, and the shared tokens have {mass:.2%} of the "
            "teacher's probability there."
        )

    def identity(self, key: str) -> dict[str, Any]:
        """The model's."""
        return identity_of(self.spec, f"{key}.init_args.teacher")

    @property
    def description(self) -> str:
        """The model's path."""
        return f"{self.spec.path} (another tokenizer)"


def shared_mass(logits: Tensor, teacher_ids: Tensor) -> Tensor:
    """The probability ``[N]`` that the teacher gives to the shared tokens, of its logits ``[N, V]``."""
    return (logits[:, teacher_ids].logsumexp(dim=-1) - logits.logsumexp(dim=-1)).exp()
