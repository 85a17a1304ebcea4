"""Whose fault it is: exceptions become messages that begin with the YAML key of what was wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import TracebackType
from typing import Any

BUILDERS = ("__init__", "__post_init__")
ERRORS = (ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError, NotImplementedError)
"""What libraries raise at arguments that cannot be. A `MisconfigurationException` of Lightning is none of these."""

_NAMED = re.compile(r"(?P<first>[A-Za-z_]\w*)(?P<rest>(\.\w+)*)(?=:| must)")
_IN_DECODING = re.compile(r"^decoding\.")


@contextmanager
def blaming(config: Mapping[str, Any], keys: Mapping[type, str]) -> Iterator[None]:
    """Turn what constructors say in here into a ValueError that names the part of ``config`` they were called for.

    Args:
        config: as parsed: dictionaries, with ``class_path`` and ``init_args`` where there is a choice of classes.
        keys: of classes that have one key and no ``class_path``.

    Raises:
        ValueError: with the key; an error that is about no part of ``config`` goes on as it is.
    """
    try:
        yield
    except ERRORS as error:
        for cause in _causes(error):
            for kind, given in reversed(list(_under_construction(cause.__traceback__))):
                if where := _place(kind, given, config, keys):
                    raise ValueError(_with_key(str(cause), where, kind, roots=set(config))) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those from which it was raised: an optional value is a union with None, of which jsonargparse says more."""
    while error is not None:
        yield error
        error = error.__cause__


def said_of_trainer(error: Exception, options: Mapping[str, Any]) -> str:
    """What Lightning's Trainer says of its arguments, with the key of the first one that it names or quotes."""
    message = str(error)
    words = set(re.findall(r"\w+", message))
    named = [name for name in options if name in words]
    quoted = [name for name, value in options.items() if isinstance(value, str) and value in words]
    return f"trainer.{[*named, *quoted][0]}: {message}" if named or quoted else f"trainer: {message}"


def _under_construction(traceback: TracebackType | None) -> Iterator[tuple[type, Mapping[str, Any]]]:
    """The classes that were being instantiated, outermost first, with the variables of their constructors."""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name in BUILDERS and "self" in frame.f_locals:
            yield type(frame.f_locals["self"]), frame.f_locals
        traceback = traceback.tb_next


def _place(kind: type, given: Mapping[str, Any], config: Mapping[str, Any], keys: Mapping[type, str]) -> str | None:
    """Where ``kind`` stands in the config; of several places that where the arguments are the same."""
    if kind in keys:
        return keys[kind]
    name = f"{kind.__module__}.{kind.__qualname__}"
    found = list(_places(config, name, ""))
    exact = [key for key, arguments in found if all(given.get(a, value) == value for a, value in arguments.items())]
    return next(iter([*exact, *(key for key, _ in found)]), None)


def _places(node: Any, name: str, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _places(item, name, f"{key}[{index}]")
    elif isinstance(node, Mapping):
        path = node.get("class_path")
        if isinstance(path, str) and (path == name or path.rpartition(".")[2] == name.rpartition(".")[2]):
            yield key, node.get("init_args") or {}
        for part, value in node.items():
            yield from _places(value, name, f"{key}.{part}" if key else str(part))


def _with_key(message: str, key: str, kind: type, roots: set[str]) -> str:
    arguments = "" if is_dataclass(kind) or "." not in key else ".init_args"
    message = _IN_DECODING.sub("", message)
    named = _NAMED.match(message)
    if named and (named["first"] in roots or named["first"] == kind.__name__) and named["rest"]:
        return message  # it knows its key
    if named and not named["rest"] and named["first"] != kind.__name__:
        return f"{key}{arguments}.{message}"
    return f"{key}: {message}" if kind.__name__ in message else f"{key}: {kind.__name__}: {message}"
