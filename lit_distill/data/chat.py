"""Conversations: the messages of a record, and which tokens of the rendered text the assistant has written.

Where the chat template marks what the assistant writes ({% generation %}), the marks decide. Most templates have none: then the
text before a turn is what the template renders for the messages before it with its prompt for the next answer, and the turn
reaches to the end of its content, found by rendering the conversation with other words in its place, and of what the template
writes to end a turn.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple

from lit_distill.data.special_tokens import PROBE, turn_end_text

AssistantTurns = Literal["all", "last", "each"]
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
"""Names of roles in public sets of conversations -> the names in chat templates."""
MARK = re.compile(r"\{%-?\s*generation\b")
Message = dict[str, Any]


class Conversation(NamedTuple):
    """The messages of a record, with the names that chat templates expect.

    Example:
        ``{"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2", "train": false}]}`` has the two
        messages without ``train``, and ``trained`` is (False, False).
    """

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    """For each message: whether the assistant has written it and it is to be learnt."""
    tools: list[Any] | None


class Turn(NamedTuple):
    """A text that ends with an answer, or a prompt for one."""

    prompt: str
    """The text up to the last answer, as a model gets it."""
    text: str
    """Prompt and answer."""
    targets: list[tuple[int, int]]
    """Characters of ``text`` that are to be learnt: begin and end of each span."""
    reference: str | None
    """The content of the answer; None if the conversation ends with the user."""


def read_conversation(messages: Any, system: Any, tools: Any, where: str) -> Conversation:
    """The conversation of a record.

    Args:
        messages: a list of ``{"role", "content"}``, as in OpenAI's format, or of ``{"from", "value"}``, as in ShareGPT's. A message
            with ``train: false`` or ``weight: 0`` is not learnt.
        system: a system message for conversations without one, or None.
        tools: the functions that the assistant may call, as JSON schemas; a list, JSON text or None.
        where: file and line of the record, for messages.

    Raises:
        ValueError: if a message has no known role or no text; the message begins with ``where``.
    """
    if not isinstance(messages, list) or not messages:
        what = _shown(messages) if messages else "missing or empty"
        raise ValueError(f"{where}: the conversation is {what}; expected a list of messages.")
    found = [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]
    if system and found[0][0]["role"] != "system":
        found.insert(0, ({"role": "system", "content": str(system)}, False))
    return Conversation(
        tuple(message for message, _ in found), tuple(trained for _, trained in found), _tools(tools, where)
    )


def _message(given: Any, where: str) -> tuple[Message, bool]:
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {_shown(given)}; expected an object with role and content.")
    name, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    role = ROLES.get(str(name).lower())
    if role is None:
        raise ValueError(f"{where} has the role {name!r}. Known roles: {', '.join(ROLES)}.")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError(f"{where} has parts that are not text, such as images, which are not supported.")
        content = "".join(texts)
    if content is None and not given.get("tool_calls"):
        raise ValueError(f"{where} ({role}) has no content.")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{where}: its content is {_shown(content)}; expected text.")
    others = {k: v for k, v in given.items() if k not in ("role", "from", "content", "value", "train", "weight")}
    train, weight = given.get("train"), given.get("weight")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{where}: train is {_shown(train)}; expected true or false.")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"{where}: weight is {_shown(weight)}; expected 0 (not learnt) or 1.")
    learnt = role == "assistant" and train is not False and weight != 0
    return {"role": role, "content": content or "", **others}, learnt


def _tools(tools: Any, where: str) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: the tools are not JSON: {error}.") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"{where}: the tools are {_shown(tools)}; expected a list of functions.")
    return tools


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer.

    Args:
        tokenizer: with a chat template.
        turns: which of the assistant's turns are learnt: "all", the "last", or "each" as an item of its own.
        responses: whether answers are needed; otherwise prompts are enough.
    """

    def __init__(self, tokenizer: Any, turns: AssistantTurns, responses: bool) -> None:
        self.tokenizer = tokenizer
        self.turns = turns
        self.responses = responses
        self.end = turn_end_text(tokenizer)
        self.has_marks = bool(MARK.search(_template_text(tokenizer))) and getattr(tokenizer, "is_fast", False)

    def empty_answers(self, conversation: Conversation) -> list[int]:
        """The positions of answers to learn that say nothing and call no tool."""
        messages = conversation.messages
        return [
            i
            for i in self._learnt(conversation)
            if not messages[i]["content"].strip() and messages[i].keys() == {"role", "content"}
        ]

    def _learnt(self, conversation: Conversation) -> list[int]:
        """The positions of the answers to learn."""
        answers = _answers(conversation)
        return [i for i in (answers[-1:] if self.turns == "last" else answers) if conversation.trained[i]]

    def items(self, conversation: Conversation, where: str) -> list[Turn]:
        """The items of a conversation: one, or with "each" one for every answer that is learnt.

        Raises:
            ValueError: if there is nothing to learn, or the template does not reproduce a turn; the message begins with ``where``.
        """
        answers, learnt, stop = _answers(conversation), self._learnt(conversation), len(conversation.messages)
        if self.responses and not any(conversation.trained[i] for i in answers):
            raise ValueError(
                f"{where}: the conversation has no turn of the assistant that is learnt. Remove the record."
            )
        if self.turns == "each" and answers:
            items = [self._item(conversation, i + 1, [i] if self.responses else [], where) for i in learnt or answers]
            ends_with_user = not self.responses and answers[-1] < stop - 1
            return items + ([self._item(conversation, stop, [], where)] if ends_with_user else [])
        if self.responses and not learnt:
            raise ValueError(f"{where}: the last turn of the assistant is not learnt. Remove the record.")
        return [self._item(conversation, stop, learnt if self.responses else [], where)]

    def _item(self, conversation: Conversation, stop: int, learnt: Sequence[int], where: str) -> Turn:
        """The first ``stop`` messages; ``learnt`` are the positions of the answers to learn."""
        messages, tools = list(conversation.messages[:stop]), conversation.tools
        is_answer = messages[-1]["role"] == "assistant"
        prompt = self._render(messages[:-1] if is_answer else messages, tools, where, prompt=True)
        reference = messages[-1]["content"] if is_answer else None
        if is_answer and not learnt:
            return Turn(prompt, prompt, [], reference)
        text = self._render(messages, tools, where, prompt=not is_answer)
        spans = self._marked(messages, learnt, tools, not is_answer) if self.has_marks else None
        if spans is None:
            ends = self._ends(messages, learnt, tools, text, where)
            spans = [(self._start(messages, position, tools, text, where), end) for position, end in ends.items()]
            if hidden := [position for (start, end), position in zip(spans, learnt, strict=True) if end <= start]:
                raise ValueError(_hidden(where, hidden[0]))
        spans = [self._with_end(text, span) for span in spans]
        if is_answer and not text.startswith(prompt):
            raise ValueError(_not_reproduced(where, len(messages), prompt, text))
        end = max([len(prompt), *(end for _, end in spans)])
        return Turn(prompt, text[:end], spans, reference)

    def _start(self, messages: list[Message], position: int, tools: list[Any] | None, text: str, where: str) -> int:
        """Where a message of the assistant begins: after what a model that writes it gets."""
        before = self._render(messages[:position], tools, where, prompt=True)
        if not text.startswith(before):
            raise ValueError(_not_reproduced(where, position + 1, before, text))
        return len(before)

    def _ends(
        self, messages: list[Message], learnt: Sequence[int], tools: list[Any] | None, text: str, where: str
    ) -> dict[int, int]:
        """Where the contents of messages of the assistant end, from what the template renders with other words in their place."""
        parts = self._replaced(messages, learnt, tools, where).split(PROBE)
        ends: dict[int, int] = {}
        at = len(parts[0])
        for position, part in zip(learnt, parts[1:], strict=False):
            content = messages[position]["content"]
            written = next((c for c in (content, content.strip()) if text.startswith(c + part, at)), None)
            if written is None:
                break
            ends[position] = at + len(written)
            at += len(written) + len(part)
        if len(parts) == len(learnt) + 1 and len(ends) == len(learnt) and at == len(text):
            return ends
        return {position: self._end(messages, position, tools, text, where) for position in learnt}

    def _end(self, messages: list[Message], position: int, tools: list[Any] | None, text: str, where: str) -> int:
        """The same for one message, whose content the template changes."""
        replaced = self._replaced(messages, [position], tools, where)
        if PROBE not in replaced:
            raise ValueError(_hidden(where, position))
        return len(text) - _num_shared(text[::-1], replaced[::-1])

    def _replaced(self, messages: list[Message], positions: Sequence[int], tools: list[Any] | None, where: str) -> str:
        other = {"role": "assistant", "content": PROBE}
        changed = [other if i in positions else message for i, message in enumerate(messages)]
        return self._render(changed, tools, where, prompt=messages[-1]["role"] != "assistant")

    def _with_end(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """The span with the end of a turn that follows it."""
        start, end = span
        return start, end + len(self.end) if self.end and text.startswith(self.end, end) else end

    def _marked(
        self, messages: list[Message], learnt: Sequence[int], tools: list[Any] | None, prompt: bool
    ) -> list[tuple[int, int]] | None:
        """The spans that the template marks of the answers to learn; None if it does not mark every answer once."""
        encoded = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        mask, offsets = encoded["assistant_masks"], encoded["offset_mapping"]
        spans = []
        for marked, group in groupby(range(len(mask)), key=lambda index: bool(mask[index])):
            members = list(group)
            if marked:
                spans.append((offsets[members[0]][0], offsets[members[-1]][1]))
        answers = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
        return [spans[answers.index(position)] for position in learnt] if len(spans) == len(answers) else None

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, where: str, *, prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise their own errors, of any type
            raise ValueError(f"{where}: the chat template refuses the conversation: {error}") from error
        return text


def _answers(conversation: Conversation) -> list[int]:
    """The positions of the assistant's messages."""
    return [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]


def _template_text(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return (
        template if isinstance(template, str) else "".join(template.values()) if isinstance(template, Mapping) else ""
    )


def _num_shared(one: str, other: str) -> int:
    """The number of characters at the beginning that two texts share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _hidden(where: str, position: int) -> str:
    return (
        f"{where}: the chat template shows nothing of message {position + 1}, which the assistant has written. Mark it "
        "train: false."
    )


def _not_reproduced(where: str, number: int, before: str, text: str) -> str:
    at = _num_shared(before, text)
    return (
        f"{where}: the chat template does not reproduce the text before message {number}: a model that writes it gets "
        f"{before[at : at + 40]!r} where the whole conversation has {text[at : at + 40]!r}. Set assistant_turns: each, or give a "
        "chat_template whose turns do not change when others follow."
    )


def encode_spans(
    tokenizer: Any, texts: Sequence[str], places: Sequence[Sequence[int]]
) -> list[tuple[list[int], list[int]]]:
    """The token ids of each text, and for each of its places (characters, ascending) the number of tokens before it.

    A text is tokenised as a whole. If a token reaches over one of the places, and with tokenizers that do not tell where their
    tokens are, the parts between the places are tokenised one by one.
    """
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        return [_encode_parts(tokenizer, text, at) for text, at in zip(texts, places, strict=True)]
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    rows = []
    for text, at, ids, offsets in zip(texts, places, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ends = [end for _, end in offsets]
        counts = [bisect_right(ends, place) for place in at]
        cut = any(count < len(ids) and offsets[count][0] < place for count, place in zip(counts, at, strict=True))
        rows.append(_encode_parts(tokenizer, text, at) if cut else (ids, counts))
    return rows


def _encode_parts(tokenizer: Any, text: str, places: Sequence[int]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    counts = []
    for start, end in pairwise([0, *places, len(text)]):
        ids += tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        counts.append(len(ids))
    return ids, counts[:-1]
