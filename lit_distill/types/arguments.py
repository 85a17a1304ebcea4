"""Errors of the arguments of an object, found by its constructor or later."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager


class ArgumentError(ValueError):
    """An argument of an object turned out to be wrong after the object was made; constructors raise a plain ValueError.

    Args:
        owner: the object that was given the argument. The command line puts the object's YAML key in front of the message.
        message: begins with the argument's name, as in ``alpha: expected ...``, or with what is wrong with the object.
    """

    def __init__(self, owner: object, message: str) -> None:
        super().__init__(message)
        self.owner = owner


@contextmanager
def arguments_of(owner: object) -> Iterator[None]:
    """Turn a ValueError whose message begins with an argument of ``owner``, or with its class, into an `ArgumentError`."""
    try:
        yield
    except ArgumentError:
        raise
    except ValueError as error:
        if not (begins_with_argument(str(error), type(owner)) or str(error).startswith(type(owner).__name__)):
            raise
        raise ArgumentError(owner, str(error)) from error


@contextmanager
def every_error_of(owner: object, end: str = "") -> Iterator[None]:
    """Turn any ValueError into an `ArgumentError` whose message begins with the class of ``owner`` and has ``end`` behind it."""
    name = type(owner).__name__
    try:
        yield
    except ArgumentError:
        raise
    except ValueError as error:
        said = str(error).rstrip(".")
        raise ArgumentError(owner, f"{said if said.startswith(name) else f'{name}: {said}'}.{end}") from error


def begins_with_argument(message: str, kind: type) -> bool:
    """Whether the first word of a message is an argument of a class, or of one of its base classes."""
    word = re.match(r"\w*", message)
    constructors = [vars(base)["__init__"] for base in kind.__mro__[:-1] if "__init__" in vars(base)]
    return word is not None and any(word[0] in inspect.signature(made).parameters for made in constructors)


def check_sizes(**sizes: int | None) -> None:
    """Refuse arguments below 1; None stands for a default.

    Raises:
        ValueError: with the name of the argument.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}.")
