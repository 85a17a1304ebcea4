"""Which column of the user's records holds the instruction, the input, the output, the id and the references."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lit_distill.data.files import ORIGIN

CANONICAL = ("instruction", "input", "output", "id", "references")
KEY = "data.init_args.fields"
NOTED_BY_PREDICT = ("finished", "stop_token", "add_special_tokens")


class Fields:
    """Reads fields of a record by their canonical name, or any other column by its own.

    Args:
        columns: canonical name -> column; a name that is not here is a column of the same name.

    Raises:
        ValueError: for a name that is not canonical.
    """

    def __init__(self, columns: Mapping[str, str] | None = None) -> None:
        self.columns = {name: name for name in CANONICAL} | dict(columns or {})
        self.mapped = tuple(columns or {})
        unknown = sorted(set(self.columns) - set(CANONICAL))
        if unknown:
            raise ValueError(
                f"{KEY}: {unknown[0]!r} is not a field. The fields are {', '.join(CANONICAL)}; each maps to a column."
            )

    def known(self, columns: Collection[str]) -> list[str]:
        """What a template may name: the canonical fields that are there, ``input`` in any case, and every column."""
        present = [name for name in CANONICAL if self.columns[name] in columns or name == "input"]
        return present + [name for name in columns if name not in present and name != ORIGIN]

    def check(self, columns: Collection[str], source: str = "the data") -> None:
        """Every mapped column exists.

        Args:
            columns: of the records.
            source: where the records come from, for messages.

        Raises:
            ValueError: naming both keys, the column and the columns that exist.
        """
        for name in self.mapped:
            if self.columns[name] not in columns:
                there = ", ".join(column for column in columns if column != ORIGIN)
                raise ValueError(
                    f"{KEY}.{name}: there is no column {self.columns[name]!r} in {source}. The columns are {there}."
                )

    def has(self, name: str, columns: Collection[str]) -> bool:
        """Whether the column behind a canonical name is there."""
        return self.columns[name] in columns

    def used(self, variables: Collection[str]) -> set[str]:
        """The columns that are read: those of the fields, of a template's variables, and what `predict` notes."""
        return {*self.columns.values(), *variables, *NOTED_BY_PREDICT}

    def is_empty(self, record: Mapping[str, Any], name: str) -> bool:
        """Whether the record holds nothing, or nothing but white space, under a canonical name."""
        value = self.value(record, name)
        return value is None or (isinstance(value, str) and not value.strip())

    def value(self, record: Mapping[str, Any], name: str) -> Any:
        """What the record holds under a canonical name or a column's own; None where it holds nothing."""
        return record.get(self.columns.get(name, name))

    def text(self, record: Mapping[str, Any], name: str, where: str) -> str:
        """The same as text; a missing ``input`` is empty.

        Raises:
            ValueError: naming the place, if there is nothing or something that is no text.
        """
        value = self.value(record, name)
        if value is None:
            if name == "input":
                return ""
            column = self.columns.get(name, name)
            mapping = f", or map it by {KEY}.{name}" if name in CANONICAL else ""
            raise ValueError(f"{where}: the field `{column}` is missing. Add it{mapping}, or remove the item.")
        if isinstance(value, list | dict):
            raise ValueError(
                f"{where}: the field `{self.columns.get(name, name)}` is {type(value).__name__}, not text."
            )
        return str(value)

    def filled(self, record: Mapping[str, Any], name: str, where: str) -> str:
        """The same as text that is not empty.

        Raises:
            ValueError: naming the place.
        """
        text = self.text(record, name, where)
        if not text.strip():
            what = "response" if name == "output" else name
            raise ValueError(
                f"{where}: the {what} is empty (field `{self.columns[name]}`). Fill it or remove the item."
            )
        return text

    def references(self, record: Mapping[str, Any], where: str) -> list[str]:
        """The accepted responses: the field ``references``, or else the output alone.

        Raises:
            ValueError: naming the place, if one is empty or no text.
        """
        value = self.value(record, "references")
        if value is None or value == []:
            return [self.filled(record, "output", where)]
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            column = self.columns["references"]
            raise ValueError(
                f"{where}: the field `{column}` must be a list of texts that are not empty, got {value!r:.80}."
            )
        return texts
