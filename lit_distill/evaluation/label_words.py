"""Classification by label words: how probable is each word after the prompt, and is the model right as often as it is sure?

As in MiniLLM, table 2 (https://arxiv.org/abs/2306.08543), where SST2 and BoolQ are answered by words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.data.collate import Item, collate, padding_id
from lit_distill.data.files import ORIGIN
from lit_distill.data.records import Records
from lit_distill.data.special_tokens import prompt_prefix, with_prefix
from lit_distill.data.templates import KEY as TEMPLATE_KEY
from lit_distill.data.templates import Template, check_chat_template
from lit_distill.data.tokenize import encode
from lit_distill.evaluation.calibration import Calibration, CalibrationMetric, collect
from lit_distill.evaluation.word_tree import WordTree
from lit_distill.parallel import ALONE, DataRanks

if TYPE_CHECKING:
    from lit_distill.models import CausalLM, FrozenTeacher


@dataclass
class LabelWords:
    r"""A classification task that a language model answers with one of a few words.

    Args:
        path: files or globs (.jsonl, .json, .parquet), one or a list; or a hub dataset's id.
        template: the prompt: fields in braces, as in ``"Review: {text}\nSentiment:"``; or "alpaca" or "chat".
        words: one for each class, with the space that a word begins with, as in ``[" negative", " positive"]``.
        label_field: the column with the true class: its index from 0, or its word.
        max_items: take no more than so many, evenly spread; -1 takes all.
        batch_size: prompts per forward pass and rank.
        split: which split of a hub dataset.
        config: which configuration of a hub dataset.
        revision: which commit, tag or branch of a hub dataset.
    """

    path: str | list[str]
    template: str
    words: list[str]
    label_field: str = "label"
    max_items: int = 1000
    batch_size: int = 16
    split: str = "train"
    config: str | None = None
    revision: str | None = None

    def check(self, key: str) -> None:
        """Refuse what no data could make right.

        Args:
            key: the task's place in the YAML.

        Raises:
            ValueError: naming the key.
        """
        if len(self.words) < 2:
            raise ValueError(f"{key}.words: expected at least two words to choose between, got {self.words}.")
        if self.max_items < 1 and self.max_items != -1:
            raise ValueError(f"{key}.max_items: expected at least 1, or -1 for all, got {self.max_items}.")
        if self.batch_size < 1:
            raise ValueError(f"{key}.batch_size: expected at least 1, got {self.batch_size}.")
        self.parsed_template(key)

    def parsed_template(self, key: str) -> Template:
        """The template, or what is wrong with it."""
        try:
            return Template(self.template)
        except ValueError as error:
            raise ValueError(str(error).replace(TEMPLATE_KEY, f"{key}.template")) from error

    def label(self, value: object, where: str, key: str) -> int:
        """The index of the class that a record names by index or word (true and false are 1 and 0)."""
        if isinstance(value, str):
            found = [i for i, word in enumerate(self.words) if word == value]
            found = found or [i for i, word in enumerate(self.words) if word.strip() == value.strip()]
        else:
            found = [i for i in range(len(self.words)) if isinstance(value, int) and i == value]
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"{where}: the field `{self.label_field}` is {value!r}, which is neither an index from 0 to "
            f"{len(self.words) - 1} nor one of the words {self.words}. Correct it, {key}.words or {key}.label_field."
        )


class Question(NamedTuple):
    """A prompt with its answer."""

    prompt_ids: list[int]
    label: int
    """Index of the right word."""
    where: str
    """The place of the record, for messages."""


def read_questions(task: LabelWords, tokenizer: Any, key: str) -> list[Question]:
    """The task's prompts, tokenised as those of `InstructionData` are, the shortest first.

    Raises:
        ValueError: naming the key or the record's place, for a missing field, an unknown label or an empty prompt.
    """
    records = Records(task.path, task.split, task.config, task.revision).read(key)
    if 0 <= task.max_items < len(records):
        records = records.select([i * len(records) // task.max_items for i in range(task.max_items)])
    template = task.parsed_template(key)
    try:
        check_chat_template(template, tokenizer)
    except ValueError as error:
        raise ValueError(str(error).replace(TEMPLATE_KEY, f"{key}.template")) from error
    columns = [name for name in records.column_names if name != ORIGIN]
    needed = {**dict.fromkeys(template.variables, "template"), task.label_field: "label_field"}
    for name, option in needed.items():
        if name not in columns:
            there = ", ".join(columns)
            raise ValueError(f"{key}.{option}: there is no field {name!r} in the data. The fields are {there}.")

    texts, labels, places = [], [], []
    for number, record in enumerate(records, start=1):
        where = record.get(ORIGIN) or f"{key}, row {number}"
        texts.append(template.render(lambda name, r=record, w=where: _text(r, name, w), tokenizer))  # type: ignore[misc]
        labels.append(task.label(record[task.label_field], where, key))
        places.append(where)
    prefix = prompt_prefix(tokenizer, template)
    questions = [
        Question(with_prefix(prefix, ids), label, where)
        for ids, label, where in zip(encode(tokenizer, texts), labels, places, strict=True)
    ]
    for question in questions:
        if not question.prompt_ids:
            raise ValueError(f"{question.where}: the prompt is empty, so no word can follow it. Remove the record.")
    return sorted(questions, key=lambda question: len(question.prompt_ids))


class LabelWordTask:
    """A task with its prompts, ready to be asked.

    Prompt and word are tokenised apart and joined, as prompts and responses are. A word's probability is that of all its
    tokens; the probabilities are renormalised over the words, and what they were together before is the ``mass``.

    Args:
        task: from the YAML.
        tokenizer: the student's.
        key: the task's place in the YAML, for messages.
        num_bins: of the calibration errors.
    """

    def __init__(self, task: LabelWords, tokenizer: Any, key: str, num_bins: int = 15) -> None:
        self.key = key
        self.batch_size = task.batch_size
        self.num_bins = num_bins
        self.pad_id = padding_id(tokenizer)
        self.tree = WordTree(encode(tokenizer, task.words), task.words, f"{key}.words")
        self.questions = read_questions(task, tokenizer, key)

    @torch.no_grad()
    def ask(
        self,
        speaker: CausalLM | FrozenTeacher,
        device: torch.device,
        ranks: DataRanks = ALONE,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Calibration:
        """The calibration of one model over all ranks, each of which asks its share of the questions.

        Args:
            speaker: the model.
            device: where its inputs go.
            ranks: how processes share the questions.
            precision: makes the context within which the model runs.

        Raises:
            ValueError: if a prompt is longer than the model can read.
        """
        self._check_fits(speaker)
        metric = CalibrationMetric(self.num_bins, ("brier", "mass")).to(device)
        metric.process_group = ranks.group
        # all ranks run the same number of batches, perhaps without questions: a sharded model needs all of them in each
        together = self.batch_size * ranks.number
        for start in range(0, len(self.questions), together):
            share = self.questions[start : start + together][ranks.rank :: ranks.number]
            with precision():
                logprobs = self.word_logprobs(speaker, [question.prompt_ids for question in share], device)
            labels = torch.tensor([question.label for question in share], dtype=torch.int64, device=device)
            collect(metric, logprobs.softmax(dim=-1), labels, mass=logprobs.exp().sum(dim=-1))
        result: Calibration = metric.compute()
        return result

    def word_logprobs(
        self, speaker: CausalLM | FrozenTeacher, prompts: Sequence[list[int]], device: torch.device
    ) -> Tensor:
        """Log-probability ``[B, W]`` float32 of each word after each of B prompts."""
        rows = [Item("", prompt, word, [], "") for prompt in prompts for word in self.tree.rows]
        sequences = collate(rows, self.pad_id, responses=True).sequences
        assert sequences is not None
        hidden = speaker.target_rows(sequences.to(device))
        hidden = hidden.view(len(prompts), self.tree.num_targets, hidden.shape[-1])
        return self.tree.logprobs(hidden, speaker.decoding_head())

    def _check_fits(self, speaker: CausalLM | FrozenTeacher) -> None:
        room = getattr(speaker.config.get_text_config(), "max_position_embeddings", None)
        longest = self.questions[-1]
        needed = len(longest.prompt_ids) + max(map(len, self.tree.words))
        if room is not None and needed > room:
            raise ValueError(
                f"{self.key}: the prompt of {longest.where} has {needed} tokens with its longest word, but "
                f"{speaker.config.model_type} at {speaker.config.name_or_path!r} reads {room}. Shorten the record or "
                f"{self.key}.template, or remove the record."
            )


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if value is None and name == "input":  # may be absent from an instruction
        return ""
    if value is None or isinstance(value, list | dict):
        what = "is missing" if value is None else f"is {type(value).__name__}, not text"
        raise ValueError(f"{where}: the field `{name}` {what}. Correct it, or remove the record.")
    return str(value)
