"""Classification with label words: the class is the most probable word after the prompt; metrics are those of calibration.

As in MiniLLM, table 2 (https://arxiv.org/abs/2306.08543), where SST2 and BoolQ are classified by words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.data import Records, Template
from lit_distill.data.collate import pad_sequences, padding_id
from lit_distill.data.encoding import encode
from lit_distill.data.files import ORIGIN
from lit_distill.data.special_tokens import prompt_prefix, with_prefix
from lit_distill.data.templates import check_chat_template
from lit_distill.distributed import SINGLE_PROCESS, DataRanks
from lit_distill.evaluation.calibration import Calibration, CalibrationMetric, collect
from lit_distill.evaluation.word_tree import WordTree
from lit_distill.types import ArgumentError, check_sizes

if TYPE_CHECKING:
    from lit_distill.models import CausalLM
    from lit_distill.teachers import FrozenTeacher


@dataclass
class Verbalizer:
    r"""A classification task with one label word per class.

    Args:
        path: files or globs (.jsonl, .json, .parquet), one or a list; or a hub dataset's id.
        template: the prompt template: a string with fields in braces, such as ``"Review: {text}\nSentiment:"``; or "alpaca" or
            "chat".
        words: one label word per class, with the space before the word, as in ``[" negative", " positive"]``.
        label_field: the column with the true class: its index from 0, or its word.
        max_items: maximum number of records, evenly spaced; -1 takes all.
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

    def __post_init__(self) -> None:
        if len(self.words) < 2:
            raise ValueError(f"words: expected at least two words to choose between, got {self.words}.")
        if self.max_items < 1 and self.max_items != -1:
            raise ValueError(f"max_items: expected at least 1, or -1 for all, got {self.max_items}.")
        check_sizes(batch_size=self.batch_size)
        Template(self.template)

    def label(self, value: object, where: str) -> int:
        """The index of a class given by its index or its word; true and false are 1 and 0."""
        if isinstance(value, str):
            found = [i for i, word in enumerate(self.words) if word == value]
            found = found or [i for i, word in enumerate(self.words) if word.strip() == value.strip()]
        else:
            found = [i for i in range(len(self.words)) if isinstance(value, int) and i == value]
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"{where}: the field `{self.label_field}` is {value!r}, which is neither an index from 0 to "
            f"{len(self.words) - 1} nor one of the words {self.words}. Correct it, or the task's words or label_field."
        )


class Question(NamedTuple):
    """A prompt with its true class."""

    prompt_ids: list[int]
    label: int
    """Index of the word of the true class."""
    where: str
    """File and line of the record, for error messages."""


def read_questions(task: Verbalizer, tokenizer: Any) -> list[Question]:
    """The prompts of the task, tokenised like those of `InstructionData`, from short to long.

    Raises:
        ValueError: for a missing field, an unknown label or an empty prompt; the message names the argument, or file and line.
    """
    records = Records(task.path, task.split, task.config, task.revision).read()
    if 0 <= task.max_items < len(records):
        records = records.select([i * len(records) // task.max_items for i in range(task.max_items)])
    template = Template(task.template)
    check_chat_template(template, tokenizer)
    columns = [name for name in records.column_names if name != ORIGIN]
    needed = {**dict.fromkeys(template.variables, "template"), task.label_field: "label_field"}
    for name, option in needed.items():
        if name not in columns:
            existing = ", ".join(columns)
            raise ValueError(f"{option}: there is no field {name!r} in the data. The fields are {existing}.")

    texts, labels, places = [], [], []
    for number, record in enumerate(records, start=1):
        where = record.get(ORIGIN) or f"{task.path}, row {number}"
        texts.append(template.render(lambda name, r=record, w=where: _text(r, name, w), tokenizer))  # type: ignore[misc]
        labels.append(task.label(record[task.label_field], where))
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


class VerbalizerTask:
    """A task with its tokenised prompts, ready to evaluate models.

    Prompt and word are tokenised separately and concatenated, like prompts and responses. The probability of a word is the
    product over its tokens. The probabilities are renormalised over the words; their sum before that is the ``mass``.

    Args:
        task: the settings from the YAML.
        tokenizer: the tokenizer of the student.
        num_bins: number of bins of the calibration errors.
    """

    def __init__(self, task: Verbalizer, tokenizer: Any, num_bins: int = 15) -> None:
        self.task = task
        self.batch_size = task.batch_size
        self.num_bins = num_bins
        self.pad_id = padding_id(tokenizer)
        self.tree = WordTree(encode(tokenizer, task.words), task.words)
        self.questions = read_questions(task, tokenizer)

    @torch.no_grad()
    def ask(
        self,
        model: CausalLM | FrozenTeacher,
        device: torch.device,
        ranks: DataRanks = SINGLE_PROCESS,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Calibration:
        """The calibration of one model over all ranks; each rank evaluates its share of the questions.

        Args:
            model: the model to evaluate.
            device: device of its inputs.
            ranks: the processes that share the questions.
            precision: returns the context manager in which the model runs.

        Raises:
            ValueError: if a prompt with its longest word exceeds the context length of the model.
        """
        self._check_fits(model)
        metric = CalibrationMetric(self.num_bins, ("brier", "mass")).to(device)
        metric.process_group = ranks.group
        # all ranks run the same number of batches, some maybe without questions: each forward of a sharded model needs all ranks
        global_batch_size = self.batch_size * ranks.number
        for start in range(0, len(self.questions), global_batch_size):
            share = self.questions[start : start + global_batch_size][ranks.rank :: ranks.number]
            with precision():
                logprobs = self.word_logprobs(model, [question.prompt_ids for question in share], device)
            labels = torch.tensor([question.label for question in share], dtype=torch.int64, device=device)
            collect(metric, logprobs.softmax(dim=-1), labels, mass=logprobs.exp().sum(dim=-1))
        result: Calibration = metric.compute()
        return result

    def word_logprobs(
        self, model: CausalLM | FrozenTeacher, prompts: Sequence[list[int]], device: torch.device
    ) -> Tensor:
        """Log-probability ``[B, W]`` float32 of each word after each of B prompts."""
        sequences = pad_sequences([(prompt, word) for prompt in prompts for word in self.tree.rows], self.pad_id)
        hidden = model.target_rows(sequences.to(device))
        hidden = hidden.view(len(prompts), self.tree.num_targets, hidden.shape[-1])
        return self.tree.logprobs(hidden, model.decoding_head())

    def _check_fits(self, model: CausalLM | FrozenTeacher) -> None:
        context_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = self.questions[-1]
        needed = len(longest.prompt_ids) + max(map(len, self.tree.words))
        if context_length is not None and needed > context_length:
            raise ArgumentError(
                self.task,
                f"template: the prompt of {longest.where} has {needed} tokens with its longest word, but "
                f"{model.config.model_type} at {model.config.name_or_path!r} accepts {context_length}. Shorten the record or "
                "the template, or remove the record.",
            )


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if value is None and name == "input":  # optional for instructions
        return ""
    if value is None or isinstance(value, list | dict):
        what = "is missing" if value is None else f"is {type(value).__name__}, not text"
        raise ValueError(f"{where}: the field `{name}` {what}. Correct it, or remove the record.")
    return str(value)
