"""Data modules for the synthetic tasks: no files, the same items on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa

from lit_distill.data.chat import AssistantTurns
from lit_distill.data.corpus import PackedText
from lit_distill.data.instructions import InstructionData
from lit_distill.data.synthetic.tasks import KINDS, generate_corpus, generate_instructions
from lit_distill.types import check_sizes

TEMPLATE = "{instruction}\n{input}\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
)
"""Renders every turn as `TEMPLATE` renders a task."""


@dataclass
class GeneratedCorpus(PackedText):
    """Generated plain text in the vocabulary of the tasks, packed into rows.

    Args:
        num_documents: number of paragraphs.
        task_seed: seed of the paragraphs.
        length: tokens of a row; every row has exactly this many.
        batch_size: rows per batch over all ranks.
    """

    num_documents: int = 5_000
    task_seed: int = 0

    def documents(self) -> tuple[str, Iterator[str]]:
        """A fingerprint of the paragraphs, and the paragraphs."""
        texts = generate_corpus(self.task_seed, self.num_documents)
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32], iter(texts)


class ProceduralData(InstructionData):
    """The synthetic tasks as a data module: no files, the same items on every machine.

    Args:
        num_train: training items; a larger number keeps the items of a smaller one and adds new ones.
        num_validation: validation items, none of them in the training split.
        num_test: test items, none of them in the other splits.
        task_seed: seed of the items; splits never overlap, not even with different seeds.
        kinds: kinds of tasks, names of `lit_distill.data.synthetic.tasks.KINDS`; all of them by default.
        turns: tasks in an item; several are a conversation, each task a turn of the user.
        template: as for `InstructionData`; the default costs two tokens.
        chat_template: as for `InstructionData`, for conversations; the default renders each turn as ``template`` renders a task.
        assistant_turns: as for `InstructionData`.
        max_prompt_length: tokens of a prompt.
        max_length: tokens of prompt and response together.
        batch_size: items per training batch over all ranks.
        tokens_per_batch: fill training batches to about so many tokens, over all ranks, instead of ``batch_size`` items.
        eval_batch_size: items per batch of every other stage, over all ranks.
        group_by_length: put items of similar length into one batch, which here means items of similar kind.
        responses: false trains on prompts only; validation and test items have responses.
        corpus: generated plain text, added to the training batches.
        num_workers: processes that load batches; 0 loads them in the main process.
        seed: seed of the order of the training items.
        tokenizer: folder or hub id; by default the tokenizer of the Lightning module.

    Raises:
        ValueError: if an argument is not allowed; the message names its key.
    """

    def __init__(
        self,
        num_train: int = 20_000,
        *,
        num_validation: int = 300,
        num_test: int = 600,
        task_seed: int = 0,
        kinds: list[str] | None = None,
        turns: int = 1,
        template: str = TEMPLATE,
        chat_template: str = CHAT_TEMPLATE,
        assistant_turns: AssistantTurns = "all",
        max_prompt_length: int = 128,
        max_length: int = 256,
        batch_size: int = 32,
        tokens_per_batch: int | None = None,
        eval_batch_size: int = 100,
        group_by_length: bool = False,
        responses: bool = True,
        corpus: GeneratedCorpus | None = None,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(
            template=template if turns == 1 else None,
            chat_template=None if turns == 1 else chat_template,
            assistant_turns=assistant_turns,
            max_prompt_length=max_prompt_length,
            max_length=max_length,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            eval_batch_size=eval_batch_size,
            group_by_length=group_by_length,
            responses=responses,
            num_workers=num_workers,
            seed=seed,
            tokenizer=tokenizer,
        )
        self.corpus = corpus
        self.turns = turns
        self.counts = {"train": num_train, "validation": num_validation, "test": num_test}
        check_sizes(**{f"num_{name}": count for name, count in self.counts.items()}, turns=turns)
        self.task_seed = task_seed
        self.kinds = tuple(KINDS) if kinds is None else tuple(kinds)
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds: there is no kind {unknown[0]!r}. The kinds are {', '.join(KINDS)}.")

    def read_split(self, name: str) -> datasets.Dataset:
        """The items of a split; `predict` uses the training items."""
        split = "train" if name == "predict" else name
        records = generate_instructions(self.task_seed, self.counts[split] * self.turns, split, self.kinds)
        if self.turns > 1:
            records = [_conversation(records[i : i + self.turns]) for i in range(0, len(records), self.turns)]
        fingerprint = hashlib.sha256(json.dumps(records).encode()).hexdigest()[:32]
        return datasets.Dataset(datasets.table.InMemoryTable(pa.Table.from_pylist(records)), fingerprint=fingerprint)


def _conversation(tasks: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """A record whose user sets one task after the other."""
    messages = []
    for task in tasks:
        messages.append({"role": "user", "content": f"{task['instruction']}\n{task['input']}"})
        messages.append({"role": "assistant", "content": task["output"]})
    return {"messages": messages}
