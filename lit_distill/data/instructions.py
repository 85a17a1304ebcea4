"""The data module for instruction data: from the user's records to batches, for every stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_distill.data.chat import AssistantTurns
from lit_distill.data.collate import padding_id
from lit_distill.data.columns import ColumnMapping
from lit_distill.data.corpus import Corpus, PackedText
from lit_distill.data.formats import have_responses
from lit_distill.data.length_limits import LengthLimits, fit_lengths, longest_prompt, num_learnt_tokens
from lit_distill.data.loader import BatchDataset, ResumableLoader, make_loader
from lit_distill.data.records import Records
from lit_distill.data.sampler import CorpusOrder, GlobalBatchSampler, num_batches, validation_mask
from lit_distill.data.templates import Template
from lit_distill.data.tokenize import check_ids, first_id_beyond, tokenize_records, unshared_token
from lit_distill.types import ArgumentError, Batch, arguments_of, check_sizes

SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}
FALLBACK_SPLITS = {"test": "validation", "predict": "train"}


class InstructionData(LightningDataModule):
    r"""Prompts with their responses, tokenised once; the batches do not depend on the number of ranks.

    Args:
        train: training records.
        validation: validation records.
        test: test records; by default the validation split.
        predict: records for whose prompts `predict` generates responses; by default the training split.
        validation_size: without ``validation``, number (int) or share (float) of the ``train`` items to validate on; ``seed``
            decides which.
        fields: field -> column, for columns with other names than the fields: instruction, input, output; prompt, completion;
            messages or conversations; text; and id, references, system, tools. The fields that there are decide how records are
            read.
        template: "alpaca", "chat", or a string with fields in braces, such as ``"Q: {question}\nA:"``. By default "alpaca" for
            instructions, "chat" for conversations, and nothing around prompts with completions and plain texts.
        chat_template: a Jinja chat template, or a file with one, in place of the tokenizer's; it is exported with the student.
        assistant_turns: of a conversation, learn "all" turns of the assistant or the "last" one; "each" makes every turn an item of
            its own, with the conversation before it as its prompt.
        responses: whether the training records have responses; false reads their prompts only. Validation and test records of
            their own are then read with the responses that they have; those of ``validation_size`` have none, only references.
        empty_responses: what to do with records whose response is empty: "error", or "drop" them and log their number.
        max_prompt_length: tokens of a prompt.
        max_length: tokens of prompt and response together.
        overlong: what to do with longer items: "drop" or "truncate".
        batch_size: items per training batch over all ranks.
        tokens_per_batch: fill training batches to about so many tokens, over all ranks, instead of ``batch_size`` items.
        eval_batch_size: items per batch of every other stage, over all ranks.
        group_by_length: put items of similar length into one batch.
        corpus: plain text that is added to the training batches.
        num_workers: processes that load batches; 0 loads them in the main process.
        seed: seed of the order and of the validation split.
        tokenizer: folder or hub id; by default the tokenizer of the Lightning module.

    Raises:
        ValueError: if an argument is not allowed; the message names its key.
    """

    def __init__(
        self,
        train: Records | None = None,
        *,
        validation: Records | None = None,
        test: Records | None = None,
        predict: Records | None = None,
        validation_size: int | float = 0,  # noqa: PYI041 - the type decides between items and share
        fields: dict[str, str] | None = None,
        template: str | None = None,
        chat_template: str | None = None,
        assistant_turns: AssistantTurns = "all",
        responses: bool = True,
        empty_responses: Literal["error", "drop"] = "error",
        max_prompt_length: int = 256,
        max_length: int = 512,
        overlong: Literal["drop", "truncate"] = "drop",
        batch_size: int = 8,
        tokens_per_batch: int | None = None,
        eval_batch_size: int = 16,
        group_by_length: bool = True,
        corpus: Corpus | None = None,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(batch_size=batch_size, eval_batch_size=eval_batch_size, tokens_per_batch=tokens_per_batch)
        for name, value in (("num_workers", num_workers), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}.")
        if validation_size < 0 or (isinstance(validation_size, float) and validation_size >= 1):
            raise ValueError(
                f"validation_size: expected a number of items, or a share below 1.0, got {validation_size}."
            )
        if validation_size and validation is not None:
            raise ValueError(f"validation_size: {validation_size} was given, and validation too. Remove one of them.")
        self.records = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.validation_size = validation_size
        self.fields = ColumnMapping(fields)
        self.template = None if template is None else Template(template)
        self.chat_template = chat_template
        self.assistant_turns: AssistantTurns = assistant_turns
        self.responses = responses
        self.empty_responses = empty_responses
        self.limits = LengthLimits(max_prompt_length, max_length, overlong)
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self.eval_batch_size = eval_batch_size
        self.group_by_length = group_by_length
        self.corpus: PackedText | None = corpus
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer = tokenizer
        self.training_prompts = True
        """Whether training batches contain the left-padded prompts, which generation needs; set by the module."""
        self._datasets: dict[str, tuple[BatchDataset, np.ndarray]] = {}
        self._uses_fallback: set[str] = set()  # splits without their own records
        self._said: set[str] = set()
        self._dropped: dict[str, int] = {}  # number of dropped records without a response, by split

    @property
    def has_validation(self) -> bool:
        """Whether `setup` found validation items."""
        return "validation" in self._datasets

    @property
    def validates_responses(self) -> bool:
        """Whether `setup` found validation items with responses, of which perplexity and calibration are."""
        return self.has_validation and self._datasets["validation"][0].responses

    @property
    def validates_references(self) -> bool:
        """Whether `setup` found a validation item with references, which responses are compared with."""
        return self.has_validation and any(map(len, self._datasets["validation"][0].rows["references"]))

    def references(self, split: str) -> Iterator[tuple[str, list[str]]]:
        """Id and accepted responses of every item that `setup` found in a split; none if there is no such split."""
        if self.num_items(split):
            rows = self._datasets[split][0].rows
            yield from zip(rows["id"], rows["references"], strict=True)

    def num_items(self, split: str) -> int:
        """Number of items that `setup` found in "train", "validation", "test" or "predict"."""
        return len(self._datasets[split][1]) if split in self._datasets else 0

    def batches_per_epoch(self) -> int:
        """Number of training batches of an epoch, over all ranks."""
        _, lengths = self._dataset("train")
        return num_batches(lengths, self.batch_size, drop_last=True, tokens_per_batch=self.tokens_per_batch)

    def longest(self, split: str) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest item, after truncation; 0 and 0 if there is no such split."""
        if not self.num_items(split):
            return 0, 0
        dataset, lengths = self._datasets[split]
        return longest_prompt(dataset.rows, self.limits), int(lengths.max())

    def content(self, split: str) -> dict[str, Any]:
        """Plain values that identify the items of a split, in their order, and the corpus: numbers and a hash of each."""
        dataset, lengths = self._datasets[split]
        code = hashlib.sha256(np.ascontiguousarray(lengths, dtype="<i8").tobytes()).hexdigest()[:32]
        items = {"items": len(lengths), "tokens": int(lengths.sum()), "lengths": code, "ids": dataset.digest}
        if dataset.corpus is None or self.corpus is None:
            return {**items, "corpus": None}
        return {**items, "corpus": {"rows": len(dataset.corpus), "length": self.corpus.length}}

    def read_split(self, name: str) -> datasets.Dataset | None:
        """The raw columns of "train", "validation", "test" or "predict"; None if there are no such records.

        Override only this method to read data from another source. The fingerprint of the dataset must depend on its content.
        """
        records = self.records[name]
        variables = () if self.template is None else self.template.variables
        columns = self.fields.used([*variables, *self._kept_fields()])
        return None if records is None else records.read(name, columns)

    def _kept_fields(self) -> frozenset[str]:
        """The fields that the run asks for."""
        module = getattr(self.trainer, "lightning_module", None)
        fields: frozenset[str] = getattr(module, "item_fields", frozenset())
        return fields

    def prepare_data(self) -> None:
        """Tokenise into the cache; Lightning calls this in one process per machine."""
        with arguments_of(self):
            tokenizer = self._tokenizer()
            for name in self._splits(None):
                self._rows(name, tokenizer)
            if self.corpus is not None and "train" in self._splits(None):
                self.corpus.rows(tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits of the stage and log how many items were dropped or truncated."""
        with arguments_of(self):
            self._load(stage)
        # without this method, Lightning fits without validation; with an empty loader it would warn
        self.__dict__.pop("val_dataloader", None)
        if stage == "fit" and "validation" not in self._datasets:
            self.__dict__["val_dataloader"] = None

    def _load(self, stage: str | None) -> None:
        tokenizer = self._tokenizer()
        for name in self._splits(stage):
            rows = self._rows(name, tokenizer)
            if rows is None:
                continue
            if name in self._uses_fallback:
                rank_zero_info(f"{name}: no records are given, using the {FALLBACK_SPLITS[name]} split.")
            if name == "predict":
                check_ids(rows["id"])
            rows, lengths, report = fit_lengths(rows, name, self.limits)
            rank_zero_info(report)
            if dropped := self._dropped.pop(name, 0):
                rank_zero_info(f"{name}: {dropped} records with an empty response dropped (empty_responses)")
            corpus = None
            if self.corpus is not None and name == "train":
                corpus = self.corpus.rows(tokenizer)
                rank_zero_info(f"corpus: {len(corpus)} rows of {self.corpus.length} tokens")
            responses = bool(rows[0]["response_ids"] or rows[0]["targets"])
            if not responses and name in ("validation", "test"):
                rank_zero_info(
                    f"{name}: no responses, so loss, perplexity and calibration of the next token are not measured"
                )
            self._datasets[name] = BatchDataset(rows, self.limits, padding_id(tokenizer), responses, corpus), lengths
        if stage is not None:
            self._dataset(SPLITS[getattr(stage, "value", stage)][0])  # raises if the stage has no data

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of ``batch_size`` items; the last items of an epoch are left out if they do not fill a batch."""
        dataset, lengths = self._dataset("train")
        dataset.prompts = self.training_prompts
        rank, world_size = self._replica()
        if self.batch_size < world_size:
            raise ArgumentError(
                self, f"batch_size: {self.batch_size}, but {world_size} ranks need at least one item each."
            )
        corpus = None
        if self.corpus is not None and dataset.corpus is not None:
            corpus = CorpusOrder(len(dataset.corpus), self.corpus.batch_size, self.seed)
        sampler = GlobalBatchSampler(
            lengths,
            self.batch_size,
            seed=self.seed,
            shuffle=not getattr(self.trainer, "overfit_batches", 0),
            group_by_length=self.group_by_length,
            drop_last=True,
            rank=rank,
            world_size=world_size,
            corpus=corpus,
            tokens_per_batch=self.tokens_per_batch,
        )
        return make_loader(dataset, sampler, self.num_workers, ResumableLoader)

    def val_dataloader(self) -> DataLoader[Batch]:
        """All items, from long to short."""
        return self.every_item("validation")

    def num_targets(self, split: str) -> int:
        """Number of tokens of a split that are learnt, or more if some of them are cut off."""
        dataset, lengths = self._dataset(split)
        return num_learnt_tokens(dataset.rows, lengths, self.limits)

    def test_dataloader(self) -> DataLoader[Batch]:
        """All items, from long to short."""
        return self.every_item("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """All items, from long to short."""
        return self.every_item("predict")

    def every_item(self, name: str) -> DataLoader[Batch]:
        """All items of a split that `setup` has loaded, once, from long to short."""
        dataset, lengths = self._dataset(name)
        rank, world_size = self._replica()
        sampler = GlobalBatchSampler(
            lengths, self.eval_batch_size, seed=self.seed, shuffle=False, rank=rank, world_size=world_size
        )
        return make_loader(dataset, sampler, self.num_workers)

    def _dataset(self, name: str) -> tuple[BatchDataset, np.ndarray]:
        if name not in self._datasets:
            others = {"validation": " or validation_size", "test": " or validation", "predict": " or train"}
            raise ArgumentError(
                self, f"{name}: this stage needs records, but there are none. Give {name}{others.get(name, '')}."
            )
        return self._datasets[name]

    def _splits(self, stage: str | None) -> tuple[str, ...]:
        if stage is None:
            state = getattr(self.trainer, "state", None)
            stage = getattr(state, "fn", None)
        return (
            SPLITS[getattr(stage, "value", stage)] if stage is not None else ("train", "validation", "test", "predict")
        )

    def _rows(self, name: str, tokenizer: Any) -> datasets.Dataset | None:
        """Tokenised rows of a split, or of the split used instead of it."""
        if name in {"train", "validation"} and self.validation_size:
            rows = self._tokenized("train", tokenizer)
            if rows is None:
                return None
            taken = validation_mask(len(rows), self.validation_size, self.seed)
            return rows.select(np.flatnonzero(taken if name == "validation" else ~taken))
        rows = self._tokenized(name, tokenizer)
        if rows is None and name in FALLBACK_SPLITS:
            self._uses_fallback.add(name)
            return self._rows(FALLBACK_SPLITS[name], tokenizer)
        return rows

    def _tokenized(self, name: str, tokenizer: Any) -> datasets.Dataset | None:
        records = self.read_split(name)
        if records is None:
            return None
        responses = self.responses and name != "predict"  # records for generation need no responses
        if not self.responses and name in ("validation", "test"):
            responses = have_responses(records, self.fields)
        rows = tokenize_records(
            records,
            name,
            tokenizer,
            template=self.template,
            fields=self.fields,
            responses=responses,
            drop_empty=self.empty_responses == "drop",
            assistant_turns=self.assistant_turns,
            kept_fields=self._kept_fields(),
            say=self._say,
        )
        if not len(rows):
            raise ValueError(f"{name}: all of the {len(records)} records have an empty response.")
        self._dropped[name] = max(0, len(records) - len(rows))  # with assistant_turns: each, a record has several rows
        return rows

    def _say(self, text: str) -> None:
        if text not in self._said:  # the records are read by `prepare_data` and by `setup`
            rank_zero_info(text)
            self._said.add(text)

    def check_token_ids(self, size: int) -> None:
        """Raise if the data contain a token that the teacher does not have.

        Args:
            size: student and teacher share the ids below this number.

        Raises:
            ValueError: if there is one; the message names split, item and token.
        """
        for name, (dataset, _) in self._datasets.items():
            for part in ("prompt", "response"):
                if (found := first_id_beyond(dataset.rows, f"{part}_ids", size)) is not None:
                    where = f"{name}: the {part} of the item {dataset.rows[found[0]]['id']!r}"
                    raise ArgumentError(self, unshared_token(where, found[1], self._tokenizer()))
            corpus = None if dataset.corpus is None else first_id_beyond(dataset.corpus, "input_ids", size)
            if corpus is not None:
                raise ArgumentError(self, unshared_token(f"corpus: row {corpus[0]}", corpus[1], self._tokenizer()))

    def _replica(self) -> tuple[int, int]:
        """Rank of this process among those that share the data, and their number; a tensor-parallel group counts as one."""
        replicas = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return replicas["rank"], replicas["num_replicas"]

    def _tokenizer(self) -> Any:
        """The tokenizer of the data, or of the model, with the chat template that was asked for."""
        tokenizer = self._own_tokenizer()
        if self.chat_template is not None:
            tokenizer.chat_template = _template_of(self.chat_template)
        return tokenizer

    def _own_tokenizer(self) -> Any:
        if self.tokenizer is None:
            tokenizer = getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
            if tokenizer is None:
                raise ValueError(
                    "tokenizer: there is no tokenizer, neither here nor in the model. Give a folder or hub id."
                )
            return tokenizer
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer: no tokenizer could be loaded from {self.tokenizer!r}: {error}") from error


def _template_of(given: str) -> str:
    """A chat template: the text itself, or the content of the file that it names."""
    if "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(
            f"chat_template: there is no file {given!r} (current folder: {Path.cwd()}), and it is no Jinja template."
        )
    return path.read_text(encoding="utf-8")
