"""Maps the fields of every format, such as instruction, output or messages, to columns of the user's records."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lit_distill.data.files import ORIGIN, with_objects

CANONICAL = (
    *("instruction", "input", "output", "id", "references"),
    *("prompt", "completion", "messages", "conversations", "text", "system", "tools"),
)
RESPONSES = ("output", "completion")
PREDICTION_COLUMNS = ("finished", "stop_token", "add_special_tokens")


class ColumnMapping:
    """Reads the fields of a record by their canonical name, and other columns by their own name.

    Args:
        columns: canonical name -> column; by default the column has the canonical name.

    Raises:
        ValueError: if a name is not canonical.
    """

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        self.columns = {name: name for name in CANONICAL} | dict(columns or {})
        self.mapped = tuple(columns or {})
        unknown = sorted(set(self.columns) - set(CANONICAL))
        if unknown:
            raise ValueError(
                f"fields: {unknown[0]!r} is not a field. The fields are {', '.join(CANONICAL)}; each maps to a column."
            )

    def known(self, columns: Collection[str]) -> list[str]:
        """The names that a template may use: the canonical fields that exist, always ``input``, and every column."""
        present = [name for name in CANONICAL if self.columns[name] in columns or name == "input"]
        return present + [name for name in columns if name not in present and name != ORIGIN]

    def check(self, columns: Collection[str], source: str = "the data", responses: bool = True) -> None:
        """Check that every mapped column exists.

        Args:
            columns: the columns of the records.
            source: where the records come from, for messages.
            responses: whether responses are read, and so need their columns.

        Raises:
            ValueError: if one does not; the message names the key, the column, the source and the existing columns.
        """
        for name in self.mapped:
            if self.columns[name] not in columns and (responses or name not in RESPONSES):
                there = ", ".join(column for column in columns if column != ORIGIN)
                raise ValueError(
                    f"fields.{name}: there is no column {self.columns[name]!r} in {source}. The columns are {there}."
                )

    def has(self, name: str, columns: Collection[str]) -> bool:
        """Whether the column of a canonical name exists."""
        return self.columns[name] in columns

    def used(self, variables: Collection[str]) -> set[str]:
        """The columns to read: those of the fields, of the template variables, and those that `predict` writes."""
        return {*self.columns.values(), *variables, *PREDICTION_COLUMNS}

    def is_empty(self, record: Mapping[str, Any], name: str) -> bool:
        """Whether the value of a canonical name is missing or only white space."""
        value = self.value(record, name)
        return value is None or (isinstance(value, str) and not value.strip())

    def value(self, record: Mapping[str, Any], name: str) -> Any:
        """The value of a canonical name or of a column; None if it is missing."""
        return with_objects(record.get(self.columns.get(name, name)))

    def text(self, record: Mapping[str, Any], name: str, where: str) -> str:
        """The value as text; a missing ``input`` is an empty text.

        Raises:
            ValueError: if the value is missing, a list or an object; the message begins with ``where``.
        """
        value = self.value(record, name)
        if value is None:
            if name == "input":
                return ""
            column = self.columns.get(name, name)
            mapping = f", or map it by fields.{name}" if name in CANONICAL else ""
            raise ValueError(f"{where}: the field `{column}` is missing. Add it{mapping}, or remove the item.")
        if isinstance(value, list | dict):
            raise ValueError(
                f"{where}: the field `{self.columns.get(name, name)}` is {type(value).__name__}, not text."
            )
        return str(value)

    def filled(self, record: Mapping[str, Any], name: str, where: str) -> str:
        """The value as text, which must not be empty.

        Raises:
            ValueError: if the value is not a text or is empty; the message begins with ``where``.
        """
        text = self.text(record, name, where)
        if not text.strip():
            what = "response" if name in RESPONSES else name
            raise ValueError(
                f"{where}: the {what} is empty (field `{self.columns[name]}`). Fill it or remove the item."
            )
        return text

    def references(self, record: Mapping[str, Any], where: str, output: str = "output") -> list[str]:
        """The accepted responses: the field ``references`` or, if it is missing, the field ``output``.

        Raises:
            ValueError: if one of them is empty or not a text; the message begins with ``where``.
        """
        value = self.value(record, "references")
        if value is None or value == []:
            return [self.filled(record, output, where)]
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            column = self.columns["references"]
            raise ValueError(
                f"{where}: the field `{column}` must be a list of texts that are not empty, got {value!r:.80}."
            )
        return texts
