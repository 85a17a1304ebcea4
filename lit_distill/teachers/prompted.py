"""A teacher that sees another prompt than the student before the same response: context distillation, worked solutions, rules.

Sources: Askell et al. 2021, https://arxiv.org/abs/2112.00861, section 2.3 (context distillation); the teacher may be the student
itself, frozen (``path`` of the same model) or as it was a while ago (`StudentTeacher`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.data.collate import pad_sequences
from lit_distill.data.encoding import encode
from lit_distill.data.special_tokens import prompt_prefix, with_prefix
from lit_distill.data.templates import Template, check_chat_template
from lit_distill.models import ModelSpec
from lit_distill.objectives import Accuracy
from lit_distill.teachers.base import (
    LoadedTeacher,
    Opening,
    Partial,
    Prefetching,
    Prepared,
    Teacher,
    TeacherRows,
    joined_identity,
    require_items,
    walk,
)
from lit_distill.teachers.cached import CachedTeacher
from lit_distill.teachers.local import as_teacher
from lit_distill.types import Sequences, check_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_distill.models import CausalLM
    from lit_distill.types import Item


class PromptTemplate:
    r"""How the prompt of a teacher is made from the fields of a record.

    Args:
        template: a string with fields in braces, such as ``"{rule}\n{student_prompt}"``; ``student_prompt`` is the prompt as the
            student sees it.
        system: if set, a system message, also with fields; the rest is then the user's turn in the tokenizer's chat template.

    Raises:
        ValueError: beginning with the argument, if one is no template.
    """

    def __init__(self, template: str, system: str | None) -> None:
        self.template = Template(template)
        if self.template.is_chat or template == "alpaca":
            raise ValueError(
                f"template: {template!r} is a name. Write a string with fields in braces, such as {{instruction}}."
            )
        self.system = system

    @property
    def fields(self) -> frozenset[str]:
        """The fields that it needs."""
        return frozenset(self.template.variables) | frozenset(self._of_system())

    def _of_system(self) -> tuple[str, ...]:
        if not self.system or "{" not in self.system:
            return ()
        return Template(self.system).variables

    def ids(self, item: Item, tokenizer: PreTrainedTokenizerBase, key: str) -> list[int]:
        """The prompt of an item as token ids.

        Args:
            item: the item.
            tokenizer: the teacher's.
            key: YAML key of the template, for messages.

        Raises:
            ValueError: naming key and item, if a field is not known or the prompt is empty.
        """
        if missing := sorted(self.fields - item.fields.keys()):
            raise ValueError(
                f"{key}.template: the field {missing[0]!r} of the item {item.id!r} is not known. The data module must pass the "
                "fields of its records, as InstructionData does."
            )
        ids = self._ids(item, tokenizer)
        if not ids:
            raise ValueError(f"{key}.template: the teacher's prompt of the item {item.id!r} is empty.")
        return ids

    def _ids(self, item: Item, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        text = self.template.render(lambda name: item.fields[name], tokenizer)
        if self.system is None:
            return with_prefix(prompt_prefix(tokenizer, self.template), encode(tokenizer, [text])[0])
        system = (
            Template(self.system).render(lambda name: item.fields[name], tokenizer)
            if self._of_system()
            else self.system
        )
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return encode(tokenizer, [str(rendered)])[0]

    def check(self, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        """Refuse a system message for a tokenizer without a chat template."""
        if self.system is not None:
            try:
                check_chat_template(Template("chat"), tokenizer)
            except ValueError:
                raise ValueError(
                    f"{key}.system: the tokenizer has no chat template, so there is no system message. Write it into template."
                ) from None

    def settings(self) -> list[str | None]:
        """Plain values that identify it."""
        return [self.template.text, self.system]


class PromptedTeacher(Teacher):
    r"""A teacher with its own prompt: another template, a system prompt, or fields that the student does not see.

    The response's own ids follow. Nothing is truncated: a prompt that is too long is an error.

    Args:
        teacher: a local model, or any other teacher.
        template: its prompt, a string with fields of the record in braces, such as ``"{rule}\n{student_prompt}"``;
            ``student_prompt`` is the prompt as the student sees it.
        system: a system message, also with fields; ``template`` is then what the user says in the chat template.
        max_prompt_length: most tokens of its prompt.
    """

    def __init__(
        self,
        teacher: Teacher | ModelSpec,
        template: str = "{student_prompt}",
        system: str | None = None,
        max_prompt_length: int = 1024,
    ) -> None:
        check_sizes(max_prompt_length=max_prompt_length)
        self.teacher = as_teacher(teacher)
        if any(isinstance(part, CachedTeacher) for _, part in walk(self.teacher)):
            raise ValueError(
                "teacher: a cache has what its teacher predicted after the prompt that it then saw. Write it with a "
                "PromptedTeacher (lit-distill cache), and train with CachedTeacher alone."
            )
        self.prompt = PromptTemplate(template, system)
        self.max_prompt_length = max_prompt_length
        self.loaded: LoadedTeacher | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._key = ""
        self._prepared = Prepared(self.prompted)

    @property
    def parts(self) -> Mapping[str, Teacher]:
        """The teacher."""
        return {"teacher": self.teacher}

    @property
    def fields(self) -> frozenset[str]:
        """Those of the template, of the system message and of the teacher."""
        return super().fields | self.prompt.fields

    @property
    def accuracy(self) -> Accuracy:  # type: ignore[override]
        """The teacher's."""
        return self.teacher.accuracy

    @property
    def answers_generated(self) -> bool:  # type: ignore[override]
        """Whether the teacher does."""
        return self.teacher.answers_generated

    @property
    def answers_all(self) -> bool:  # type: ignore[override]
        """Whether the teacher does."""
        return self.teacher.answers_all

    def open(self, opening: Opening, key: str) -> int | None:
        """Open the teacher."""
        self.prompt.check(opening.tokenizer, f"{key}.init_args")
        self._tokenizer, self._key = opening.tokenizer, key
        return self.teacher.open(opening, f"{key}.init_args.teacher")

    def load(self, vocabulary_size: int | None, student: CausalLM | None) -> LoadedTeacher:
        """Load the teacher."""
        self.loaded = self.teacher.load(vocabulary_size, student)
        return self

    def prompted(self, sequences: Sequences) -> Sequences:
        """The texts with the teacher's prompt in front of everything from the first target on; the same targets in their order.

        Raises:
            ValueError: naming the item, if its prompt is too long, or the text has no item.
        """
        assert self._tokenizer is not None
        tokens, masks = sequences.tokens_on_host, sequences.masks
        texts: list[tuple[list[int], list[int]]] = []
        learnt: list[list[bool]] = []
        for row in range(len(sequences)):
            ids, targets = tokens[row][masks.attended[row]].tolist(), masks.targets[row][masks.attended[row]].tolist()
            if True not in targets:
                texts.append((ids[:1], []))
                learnt.append([False])
                continue
            first = targets.index(True)
            require_items(sequences, self, self._key)
            prompt = self._prompt(sequences.items[row])
            texts.append((prompt, ids[first:]))
            learnt.append([False] * len(prompt) + targets[first:])
        seen = pad_sequences(texts, pad_id=0)
        mask = torch.zeros_like(seen.target_mask)
        for row, values in enumerate(learnt):
            mask[row, : len(values)] = torch.tensor(values)
        shown = Sequences(seen.input_ids, seen.attention_mask, mask, items=sequences.items)
        return shown.to(sequences.input_ids.device)

    def _prompt(self, item: Item) -> list[int]:
        assert self._tokenizer is not None
        ids = self.prompt.ids(item, self._tokenizer, f"model.{self._key}.init_args")
        if len(ids) > self.max_prompt_length:
            raise ValueError(
                f"model.{self._key}.init_args.max_prompt_length: the teacher's prompt of the item {item.id!r} has {len(ids)} "
                f"tokens, more than {self.max_prompt_length}. Raise it, or shorten the template or the fields."
            )
        return ids

    def rows(self, sequences: Sequences) -> TeacherRows:
        """The teacher's rows after its own prompt."""
        assert self.loaded is not None
        shown = self._prepared.take(sequences)
        limit = getattr(getattr(self.loaded, "lm", None), "context_length", None)
        if limit is not None and shown.input_ids.shape[1] > limit:
            sizes = shown.masks.attended.sum(dim=1)
            item = shown.items[int(sizes.argmax())].id
            raise ValueError(
                f"model.{self._key}.init_args.max_prompt_length: with the teacher's prompt, the text of the item {item!r} has "
                f"{int(sizes.max())} tokens, and the teacher's context length is {limit}. Shorten the template, the fields or the "
                "data."
            )
        return self.loaded.rows(shown)

    def prefetch(self, sequences: Sequences) -> None:
        """See `Prefetching`."""
        if isinstance(self.loaded, Prefetching):
            self.loaded.prefetch(self._prepared.ahead(sequences))

    def num_answered(self, sequences: Sequences) -> int:
        """See `Partial`."""
        if isinstance(self.loaded, Partial):
            return self.loaded.num_answered(self._prepared.ahead(sequences))
        return int(sequences.masks.targets.sum())

    def identity(self, key: str) -> dict[str, Any]:
        """The teacher's, with the prompt."""
        return joined_identity(self, key, prompt=self.prompt.settings())

    @property
    def description(self) -> str:
        """The teacher's."""
        return f"{self.teacher.description} (with its own prompt)"
