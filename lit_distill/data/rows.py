"""Turns records into rows of token ids: the columns of a row, and the reader of a batch of records."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

from datasets import Features, List, Value

from lit_distill.data.chat import AssistantTurns, ChatRenderer, Conversation, encode_spans, read_conversation
from lit_distill.data.columns import ColumnMapping
from lit_distill.data.encoding import encode
from lit_distill.data.files import ORIGIN
from lit_distill.data.formats import Format
from lit_distill.data.special_tokens import prompt_prefix, response_end, with_prefix
from lit_distill.data.templates import Template

FEATURES = Features(
    {
        "id": Value("string"),
        "prompt_ids": List(Value("int32")),  # with the special tokens that the tokenizer adds before a prompt
        "response_ids": List(Value("int32")),  # with EOS or the end of a turn; empty without responses
        "targets": List(
            Value("int32")
        ),  # begin and end of each span that is learnt, counted from the prompt; empty: the response
        "num_prefix_tokens": Value("int32"),  # tokens at the start of the prompt that truncation keeps (BOS)
        "num_prompt_tokens": Value("int32"),
        "num_tokens": Value("int32"),  # of prompt and response
        "references": List(Value("string")),
        "prompt_text": Value("string"),
        "fields": Value("string"),  # those that a teacher asks for, as JSON; empty without
    }
)
STUDENT_PROMPT = "student_prompt"
"""The name of the prompt, as the student sees it, among the fields that are kept."""


class Rendered(NamedTuple):
    """A record, or an answer of a conversation, as texts, before it is tokenised."""

    id: str
    prompt: str
    response: str
    references: list[str]
    prefix: list[int]
    """Ids before the prompt."""
    end: list[int]
    """Ids behind the response."""
    where: str
    targets: list[tuple[int, int]] | None = None
    """Of conversations: characters of prompt and response that are learnt; None learns the whole response."""
    fields: str = ""
    """Fields of the record, as JSON."""


class RecordReader:
    """Turns a batch of records into rows; it is sent to other processes."""

    def __init__(
        self,
        split: str,
        tokenizer: Any,
        template: Template,
        fields: ColumnMapping,
        kind: Format,
        columns: list[str],
        responses: bool,
        drop_empty: bool,
        turns: AssistantTurns,
        kept_fields: Collection[str],
    ) -> None:
        self.split = split
        self.kept_fields = sorted(kept_fields)
        self.tokenizer = tokenizer
        self.template = template
        self.fields = fields
        self.kind = kind
        self.responses = responses
        self.drop_empty = drop_empty
        self.output = "completion" if kind == "completion" else "output"
        self.with_references = responses or fields.has("references", columns) or fields.has(self.output, columns)
        self.renderer = ChatRenderer(tokenizer, turns, responses) if kind == "conversation" else None
        self.prefix = prompt_prefix(tokenizer, template)
        self.end = response_end(tokenizer, template) if kind != "conversation" else []

    def rows(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """The rows of some records, by column."""
        items: list[Rendered] = []
        for position, index in enumerate(indices):
            record = {name: values[position] for name, values in batch.items()}
            where = record.get(ORIGIN) or f"{self.split}, row {index + 1}"
            identity = self.fields.value(record, "id")
            name = f"{self.split}-{index}" if identity is None else str(identity)
            known = self._kept(record, where)
            items += (item._replace(fields=known(item)) for item in self._rendered(record, name, where))
        return self._tokenized(items)

    def _kept(self, record: dict[str, Any], where: str) -> Callable[[Rendered], str]:
        if not self.kept_fields:
            return lambda _: ""
        texts = {}
        for name in self.kept_fields:
            if name != STUDENT_PROMPT and self.fields.value(record, name) is None and name != "input":
                raise ValueError(
                    f"{where}: the field `{self.fields.columns.get(name, name)}` is missing, which a teacher, reference or "
                    "reward of the run asks for. Add it, or change its template or column."
                )
            if name != STUDENT_PROMPT:
                texts[name] = self.fields.text(record, name, where)
        asked = STUDENT_PROMPT in self.kept_fields
        return lambda item: json.dumps(texts | ({STUDENT_PROMPT: item.prompt} if asked else {}), ensure_ascii=False)

    def _rendered(self, record: dict[str, Any], name: str, where: str) -> Iterator[Rendered]:
        if self.kind == "conversation":
            yield from self._turns(record, name, where)
        elif self.kind == "text":
            yield Rendered(name, "", self.fields.filled(record, "text", where), [], self.prefix, self.end, where)
        else:
            yield from self._instruction(record, name, where)

    def _instruction(self, record: dict[str, Any], name: str, where: str) -> Iterator[Rendered]:
        fields = self.fields
        is_generated = record.get("finished") is not None
        may_be_empty = is_generated and fields.value(record, self.output) == ""  # the model generated EOS first
        if self.drop_empty and self.responses and not may_be_empty and fields.is_empty(record, self.output):
            return
        prompt = _prompt(self.template, fields, record, where, self.tokenizer)
        empty = [""] if may_be_empty and not fields.value(record, "references") else None
        has_none = not self.responses and all(fields.is_empty(record, name) for name in ("references", self.output))
        reads = self.with_references and empty is None and not has_none
        references = fields.references(record, where, self.output) if reads else []
        response = fields.filled(record, self.output, where) if self.responses and not may_be_empty else ""
        # columns that `predict` wrote: prompts without BOS, responses truncated at max_new_tokens, stop tokens of the others
        prefix = [] if record.get("add_special_tokens") is False else self.prefix
        end = [] if record.get("finished") is False else _stop_token_ids(record, self.tokenizer) or self.end
        yield Rendered(name, prompt, response, empty or references, prefix, end, where)

    def _turns(self, record: dict[str, Any], name: str, where: str) -> Iterator[Rendered]:
        assert self.renderer is not None
        conversation = self._conversation(record, where)
        if self.responses and (empty := self.renderer.empty_answers(conversation)):
            if self.drop_empty:
                return
            raise ValueError(
                f"{where}: message {empty[0] + 1} (assistant) is empty. Fill it, give it train: false, remove the record, or set "
                "empty_responses: drop."
            )
        turns = self.renderer.items(conversation, where)
        given = self.fields.value(record, "references")
        for number, turn in enumerate(turns, start=1):
            references = [given] if isinstance(given, str) else given or [turn.reference]
            own = name if len(turns) == 1 else f"{name}/{number}"
            answer = turn.text[len(turn.prompt) :]
            texts = [text for text in references if text]
            yield Rendered(own, turn.prompt, answer, texts, [], [], where, turn.targets)

    def _conversation(self, record: dict[str, Any], where: str) -> Conversation:
        value = partial(self.fields.value, record)
        messages = value("messages")
        if messages is None:
            messages = value("conversations")
        if messages is None and isinstance(prompt := value("prompt"), list):  # what precedes a completion is not learnt
            before = [{**m, "train": False} if isinstance(m, dict) else m for m in prompt]
            completion = value("completion") or []
            messages = before + (
                completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
            )
        return read_conversation(messages, value("system"), value("tools"), where)

    def _tokenized(self, items: list[Rendered]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
        ids = self._whole(items) if self.kind == "conversation" else self._parts(items)
        for item, (prompt, response, targets) in zip(items, ids, strict=True):
            if not prompt:
                raise ValueError(
                    f"{item.where}: the prompt is empty, so there is nothing to respond to. Fill it or remove the item."
                )
            row = {
                "id": item.id,
                "prompt_ids": prompt,
                "response_ids": response,
                "targets": targets,
                "num_prefix_tokens": len(item.prefix) or int(prompt[0] == self.tokenizer.bos_token_id),
                "num_prompt_tokens": len(prompt),
                "num_tokens": len(prompt) + len(response),
                "references": item.references,
                "prompt_text": item.prompt,
                "fields": item.fields,
            }
            for name, value in row.items():
                columns[name].append(value)
        return columns

    def _parts(self, items: list[Rendered]) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Prompt, response and targets, tokenised separately; of plain texts, the prompt is BOS or else the first token."""
        prompts = encode(self.tokenizer, [item.prompt for item in items])
        responses = encode(self.tokenizer, [item.response for item in items]) if self.responses else [[] for _ in items]
        for item, prompt_ids, response_ids in zip(items, prompts, responses, strict=True):
            prompt = with_prefix(item.prefix, prompt_ids)
            response = response_ids + item.end if self.responses else []
            if self.kind == "text" and not prompt:
                prompt, response = response[:1], response[1:]
            yield prompt, response, []

    def _whole(self, items: list[Rendered]) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Prompt, response and targets of conversations, tokenised as a whole."""
        places = [
            sorted({len(item.prompt), *(place for span in item.targets or [] for place in span)}) for item in items
        ]
        encoded = encode_spans(self.tokenizer, [item.prompt + item.response for item in items], places)
        for item, at, (ids, counts) in zip(items, places, encoded, strict=True):
            tokens = dict(zip(at, counts, strict=True))
            size = tokens[len(item.prompt)]
            targets = [tokens[place] for span in item.targets or [] for place in span]
            yield ids[:size], ids[size:], [] if targets == [size, len(ids)] else targets


def _stop_token_ids(record: dict[str, Any], tokenizer: Any) -> list[int]:
    """The id of the stop token that `predict` recorded; empty if there is none or the tokenizer does not have it."""
    token = record.get("stop_token")
    ids = [] if token is None else [tokenizer.convert_tokens_to_ids(token)]
    return [] if ids in ([None], [tokenizer.unk_token_id]) else ids


def _prompt(template: Template, fields: ColumnMapping, record: dict[str, Any], where: str, tokenizer: Any) -> str:
    def field(name: str) -> str:
        return fields.filled(record, name, where) if name == "instruction" else fields.text(record, name, where)

    def optional(name: str) -> str:
        return "" if fields.value(record, name) is None else fields.text(record, name, where)

    prompt = optional("prompt") if template.is_chat and fields.value(record, "instruction") is None else ""
    return template.render(field, tokenizer, optional("system") if template.is_chat else "", prompt)
