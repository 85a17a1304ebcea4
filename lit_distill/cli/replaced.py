"""A class that replaces another one in a config starts from its own defaults, without the arguments of the other class.

jsonargparse keeps the arguments that both classes have: ``optimizer: SGD`` would get the weight decay of the default AdamW, and an
`EarlyStopping` that replaces a `ModelCheckpoint` would get its ``mode: max``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from jsonargparse import Namespace, _typehints

HOOK = "discard_init_args_on_class_path_change"
"""The function that jsonargparse calls when a class replaces another one: from a second file, the command line or a default."""


MARK = "__subclasses_disabled__"
"""A key that jsonargparse adds to a dataclass in a config; a class that replaces the dataclass must not keep it."""


class Replacement(NamedTuple):
    """A class in the config that replaced another one."""

    before: str
    """Import path of the replaced class."""
    after: str
    """Import path of the new class."""
    arguments: Mapping[str, Any]
    """Arguments of ``before``, from the user or by default."""


@contextmanager
def drop_arguments_of_replaced_classes() -> Iterator[list[Replacement]]:
    """While parsing, drop all arguments of a class that is replaced; yields the list of replacements."""
    replacements: list[Replacement] = []
    keep_shared = getattr(_typehints, HOOK)

    def drop(parser_or_action: Any, previous: Any, value: Any) -> None:
        before = previous["class_path"] if previous and "class_path" in previous else None
        if before is None:
            keep_shared(parser_or_action, previous, value)
        elif _imported(before) is not _imported(value["class_path"]):
            arguments = {**_take_arguments(previous, "init_args"), **_take_arguments(previous, "dict_kwargs")}
            was_model = previous.pop(MARK, None) is not None  # it has nothing that a teacher of another kind could take
            if not was_model:
                replacements.append(Replacement(before, value["class_path"], arguments))

    setattr(_typehints, HOOK, drop)
    try:
        yield replacements
    finally:
        setattr(_typehints, HOOK, keep_shared)


def replacement_warnings(replacements: Iterable[Replacement], defaults: Iterable[Any]) -> list[str]:
    """Warnings about arguments that the user wrote for a class that was replaced.

    Args:
        replacements: the replacements in a config.
        defaults: default values of the config's keys; arguments in them were not written by the user.
    """
    shipped = {default["class_path"]: default.get("init_args") or {} for default in defaults if _is_class(default)}
    messages = []
    for before, after, arguments in replacements:
        usual = {**_own_defaults(before), **shipped.get(before, {})}
        written = {name: value for name, value in arguments.items() if name not in usual or value != usual[name]}
        old, new = (path.rpartition(".")[2] for path in (before, after))
        if written:
            listed = ", ".join(f"{name}: {value}" for name, value in written.items())
            messages.append(f"{new} replaces {old}, so these arguments of {old} are ignored: {listed}.")
    return list(dict.fromkeys(messages))


def _is_class(default: Any) -> bool:
    return isinstance(default, dict | Namespace) and "class_path" in default


def _take_arguments(spec: Any, part: str) -> dict[str, Any]:
    """Remove and return the arguments in one part of a class's config."""
    held = spec.get(part)
    arguments = vars(held) if isinstance(held, Namespace) else held
    if not isinstance(arguments, dict):
        return {}
    taken = dict(arguments)
    arguments.clear()
    return taken


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):  # a class inside a class: compare its path
        return path


def _own_defaults(path: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(_imported(path)).parameters
    except (TypeError, ValueError):  # a class written in C
        return {}
    return {name: parameter.default for name, parameter in parameters.items()}
