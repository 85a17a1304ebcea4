"""A class that replaces another one in a config starts from its own defaults: nothing written for the other one stays.

jsonargparse keeps the arguments that both classes have, so ``optimizer: SGD`` would get the weight decay of the default AdamW, and
an `EarlyStopping` in place of a `ModelCheckpoint` its ``mode: max``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from jsonargparse import Namespace, _typehints

HOOK = "discard_init_args_on_class_path_change"
"""What jsonargparse calls wherever a class replaces another one: in a second file, on the command line, over a default."""


class Replacement(NamedTuple):
    """A class that took the place of another one."""

    before: str
    """Its import path."""
    after: str
    arguments: Mapping[str, Any]
    """What ``before`` had, written or by default."""


@contextmanager
def arguments_stay_with_their_class() -> Iterator[list[Replacement]]:
    """While parsing: drop all arguments of a class that is replaced. Gives the list of what has been replaced."""
    replacements: list[Replacement] = []
    keep_shared = getattr(_typehints, HOOK)

    def drop(parser_or_action: Any, previous: Any, value: Any) -> None:
        before = previous["class_path"] if previous and "class_path" in previous else None
        if before is None:
            keep_shared(parser_or_action, previous, value)
        elif _imported(before) is not _imported(value["class_path"]):
            arguments = {**_emptied(previous, "init_args"), **_emptied(previous, "dict_kwargs")}
            replacements.append(Replacement(before, value["class_path"], arguments))

    setattr(_typehints, HOOK, drop)
    try:
        yield replacements
    finally:
        setattr(_typehints, HOOK, keep_shared)


def warnings_of(replacements: Iterable[Replacement], defaults: Iterable[Any]) -> list[str]:
    """What a user should know who wrote arguments that no longer apply.

    Args:
        replacements: of a config.
        defaults: of the keys of the config; of those that are a class with its arguments, nobody wrote these.
    """
    shipped = {default["class_path"]: default.get("init_args") or {} for default in defaults if _is_class(default)}
    messages = []
    for before, after, arguments in replacements:
        usual = {**_own_defaults(before), **shipped.get(before, {})}
        written = {name: value for name, value in arguments.items() if name not in usual or value != usual[name]}
        old, new = (path.rpartition(".")[2] for path in (before, after))
        if written:
            listed = ", ".join(f"{name}: {value}" for name, value in written.items())
            messages.append(f"{new} replaces {old}, and what was written for {old} does not apply to it: {listed}.")
    return list(dict.fromkeys(messages))


def _is_class(default: Any) -> bool:
    return isinstance(default, dict | Namespace) and "class_path" in default


def _emptied(spec: Any, part: str) -> dict[str, Any]:
    """The arguments in a part of a class's config, which then has none."""
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
    except (ImportError, AttributeError, ValueError):  # a class inside a class; its path is its name
        return path


def _own_defaults(path: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(_imported(path)).parameters
    except (TypeError, ValueError):  # of a class in C
        return {}
    return {name: parameter.default for name, parameter in parameters.items()}
