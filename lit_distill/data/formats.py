"""Recognises what records look like by their columns: instructions, prompts with completions, conversations or plain text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lit_distill.data.chat import ROLES
from lit_distill.data.columns import RESPONSES, ColumnMapping
from lit_distill.data.files import ORIGIN, with_objects
from lit_distill.data.templates import Template

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal["conversation", "completion", "instruction", "text"]
SHAPES: dict[Format, tuple[tuple[str, ...], ...]] = {
    "conversation": (("messages",), ("conversations",)),
    "completion": (("prompt", "completion"),),
    "instruction": (("instruction", "output"),),
    "text": (("text",),),
}
"""The fields that make up a format, best known first; the first of a format's shapes that the records have is read."""
PROMPTS: dict[Format, tuple[tuple[str, ...], ...]] = {"completion": (("prompt",),), "instruction": (("instruction",),)}
"""The fields that are enough where no responses are needed."""
KNOWN = (
    "`messages` or `conversations` (lists of messages), `prompt` and `completion`, `instruction` and `output` (and `input`), or "
    "`text`"
)


def recognise(
    columns: Collection[str],
    fields: ColumnMapping,
    template: Template | None,
    responses: bool,
    record: Mapping[str, Any],
    source: str,
) -> Format:
    """The format of records.

    Fields that are mapped, and a template that is not "chat", decide; else the columns do, if they leave no choice.

    Args:
        columns: their columns.
        fields: maps fields to columns.
        template: the template that was asked for, or None.
        responses: whether responses are needed.
        record: the first record, for messages.
        source: where the records come from, for messages.

    Raises:
        ValueError: if the columns fit no format, or several; the message shows the first record.
    """
    found: list[Format] = [
        kind for kind, shapes in SHAPES.items() if any(_has(shape, fields, columns) for shape in shapes)
    ]
    if not responses:
        found += [kind for kind, shapes in PROMPTS.items() if kind not in found and _has(shapes[0], fields, columns)]
    if template is not None and not template.is_chat:
        if "conversation" in found and len(found) == 1:
            raise ValueError(
                f"template: {template.text!r} cannot render the conversations in {source}. Remove it, or set chat."
            )
        return "instruction"
    mapped = {
        kind for kind, shapes in SHAPES.items() if any(name in shape for shape in shapes for name in fields.mapped)
    }
    if len(mapped) == 1:
        return mapped.pop()
    if len(found) > 1 and "text" in found:
        found.remove("text")  # often the same content, rendered for another model
    if len(found) == 1:
        return found[0]
    shown = {name: with_objects(value) for name, value in record.items() if name != ORIGIN and value is not None}
    if not found:
        raise ValueError(
            f"fields: {source} have none of the known shapes: {KNOWN}. The columns are {', '.join(columns)}; of the known "
            f"ones, the first record has {shown!r:.300}. Map its columns, as in fields: {{instruction: question, output: answer}}."
        )
    first = SHAPES[found[0]][0][0]
    raise ValueError(
        f"fields: {source} may be read as {' or as '.join(found)}. The first record has {shown!r:.300}. Choose by naming a column, "
        f"as in fields: {{{first}: {fields.columns[first]}}}."
    )


def have_responses(records: Dataset, fields: ColumnMapping) -> bool:
    """Whether a field of responses is mapped or there, or the first conversation ends with a turn of the assistant."""
    if any(name in fields.mapped or fields.has(name, records.column_names) for name in RESPONSES):
        return True
    first = records[0] if len(records) else {}
    messages = fields.value(first, "messages") or fields.value(first, "conversations")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and ROLES.get(str(last.get("role", last.get("from"))).lower()) == "assistant"


def _has(shape: tuple[str, ...], fields: ColumnMapping, columns: Collection[str]) -> bool:
    return all(fields.has(name, columns) for name in shape)
