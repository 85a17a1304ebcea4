"""Puts the YAML key in front of errors about arguments, and turns other errors into messages that say what to do."""

from __future__ import annotations

import errno
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jsonargparse import add_instantiator
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_distill.distributed.ranks import LOST_A_RANK
from lit_distill.types import ArgumentError, begins_with_argument

ERRORS = (ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError, MisconfigurationException)
"""What libraries raise for wrong arguments. Lightning's `MisconfigurationException` is a subclass of none of the others."""
DISK_ERRORS = {
    errno.ENOSPC: "Free some disk space. An earlier checkpoint is still good: --ckpt_path last resumes from it.",
    errno.EDQUOT: "Your disk quota is used up. An earlier checkpoint is still good: --ckpt_path last resumes from it.",
    errno.EROFS: "Give a folder that can be written.",
    errno.EACCES: "Give a folder that can be written.",
    errno.ENOENT: "Give a path that exists.",
    errno.ENOTDIR: "Give a folder that can be written.",
}
"""What the user can do about errors of the operating system that are not bugs."""
Built = TypeVar("Built")
_current: ContextVar[ConfigKeys | None] = ContextVar("_current", default=None)


class ConfigError(ValueError):
    """An error in the config; the message begins with the YAML key."""


class Place(NamedTuple):
    """Where an object stands in the config."""

    key: str
    arguments: str
    """The key that its arguments stand below."""
    given: Mapping[str, Any]


class ConfigKeys:
    """The YAML keys of the objects of a run.

    Args:
        config: the parsed config: dictionaries, with ``class_path`` and ``init_args`` where a class can be chosen.
        fixed: the keys of classes that have a key of their own and no ``class_path``.
    """

    def __init__(self, config: Mapping[str, Any], fixed: Mapping[type, str]) -> None:
        self.config = config
        self.fixed = fixed
        self._built: list[tuple[object, Mapping[str, Any]]] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Give errors about arguments their key, in constructors that jsonargparse calls and wherever `ArgumentError` is raised.

        Raises:
            ConfigError: with the key; an error that belongs to no part of the config is raised unchanged.
        """
        token = _current.set(self)
        try:
            yield
        except ERRORS as error:
            for cause in _causes(error):
                if isinstance(cause, ConfigError):
                    raise ConfigError(str(cause)) from error
                if isinstance(cause, ArgumentError) and (place := self._place_of(cause.owner)):
                    raise ConfigError(_with_key(str(cause), place, type(cause.owner))) from error
            raise
        finally:
            _current.reset(token)

    def build(self, kind: type[Built], arguments: tuple[Any, ...], named: dict[str, Any]) -> Built:
        """Call a constructor; its errors get the key."""
        try:
            _check_nulls(kind, named)
            built = kind(*arguments, **named)
        except (ConfigError, ArgumentError):
            raise
        except ERRORS as error:
            place = self._find(kind, named)
            if place is None:
                raise
            raise ConfigError(_with_key(str(error), place, kind)) from error
        self._built.append((built, named))
        return built

    def _place_of(self, owner: object) -> Place | None:
        named = next((named for built, named in self._built if built is owner), {})
        return self._find(type(owner), named)

    def _find(self, kind: type, named: Mapping[str, Any]) -> Place | None:
        """The place of a class in the config; if it occurs several times, the one with the same arguments."""
        found = list(_places(self.config, kind, ""))
        if (key := self.fixed.get(kind)) is not None:
            given = self.config.get(key)
            found.append(Place(key, key, given if isinstance(given, Mapping) else {}))
        exact = [place for place in found if _fits(place.given, named)]
        return next(iter([*exact, *found]), None)


def _build(class_type: type[Built], *args: Any, **kwargs: Any) -> Built:
    keys = _current.get()
    return class_type(*args, **kwargs) if keys is None else keys.build(class_type, args, kwargs)


add_instantiator(_build, object, subclasses=True)


def _places(node: Any, kind: type, key: str) -> Iterator[Place]:
    """The places of a class: where ``class_path`` names it, or, for a dataclass, where exactly its fields are given."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _places(item, kind, f"{key}[{index}]")
    elif isinstance(node, Mapping):
        path = node.get("class_path")
        if isinstance(path, str) and _names(path, kind):
            yield Place(key, f"{key}.init_args", node.get("init_args") or {})
        elif is_dataclass(kind) and set(node) == set(inspect.signature(kind).parameters):
            yield Place(key, key, node)
        for part, value in node.items():
            yield from _places(value, kind, f"{key}.{part}" if key else str(part))


def _names(path: str, kind: type) -> bool:
    """Whether a ``class_path`` names a class, which may be imported from several modules."""
    module, _, name = path.rpartition(".")
    if name != kind.__name__ or not module or module not in sys.modules:
        return name == kind.__name__
    return getattr(sys.modules[module], name, kind) is kind


def _fits(given: Mapping[str, Any], named: Mapping[str, Any]) -> bool:
    """Whether an object was built with the values of a config; objects inside them cannot be compared."""
    return all(_is_like(value, named.get(name)) for name, value in given.items())


def _is_like(given: Any, built: Any) -> bool:
    if isinstance(given, list) and isinstance(built, list | tuple):
        return len(given) == len(built) and all(map(_is_like, given, built))
    if isinstance(given, Mapping):
        return not isinstance(built, Mapping) or (
            given.keys() == built.keys() and all(_is_like(value, built[key]) for key, value in given.items())
        )
    return bool(given == built)


def _check_nulls(kind: type, named: Mapping[str, Any]) -> None:
    """Reject null for an argument that cannot be None: jsonargparse accepts it everywhere."""
    for name, parameter in inspect.signature(kind).parameters.items():
        default, annotation = parameter.default, parameter.annotation
        unknown = annotation is parameter.empty or default is None or default is parameter.empty
        if named.get(name, default) is not None or unknown:
            continue
        if not re.search(r"None|Optional|Any|object", str(annotation)):
            wanted = getattr(annotation, "__name__", annotation)
            raise ValueError(f"{name}: expected {wanted}, got null. Remove the key for its default, {default}.")


def _with_key(message: str, place: Place, kind: type) -> str:
    if begins_with_argument(message, kind):
        return f"{place.arguments}.{message}"
    return f"{place.key}: {message}" if kind.__name__ in message else f"{place.key}: {kind.__name__}: {message}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes: jsonargparse wraps the errors of optional values, whose type is a union with None."""
    while error is not None:
        yield error
        error = error.__cause__


def trainer_message(error: Exception, options: Mapping[str, Any]) -> str:
    """The message of Lightning's Trainer, with the key of the first argument whose name or value is in it."""
    message = str(error)
    words = set(re.findall(r"\w+", message))
    named = [name for name in re.findall(r"Trainer\((\w+)=", message) if name in options]
    named += [name for name in options if name in words]
    quoted = [name for name, value in options.items() if isinstance(value, str) and value in words]
    return f"trainer.{[*named, *quoted][0]}: {message}" if named or quoted else f"trainer: {message}"


def user_message(error: BaseException | None, packages: Sequence[Path]) -> str | None:
    """The message for the user if the error comes from the config or the data; None for a bug, which needs a traceback.

    Messages for users are those that the project or Lightning raises on purpose, even if another library wrapped them.

    Args:
        error: the exception that ended the run.
        packages: folders of the project's code.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return f"{error.strerror}: {error.filename or 'while writing'}. {DISK_ERRORS[error.errno]}"
        if isinstance(error, RuntimeError) and LOST_A_RANK.search(str(error)):
            rank = getattr(rank_zero_only, "rank", 0)
            return (
                f"rank {rank} has lost the connection to another rank. Its error message is above, unless it was killed, for "
                "example when memory ran out. --ckpt_path last resumes from the last checkpoint."
            )
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = isinstance(error, ValueError | OSError) and any(raised_in.is_relative_to(p) for p in packages)
        if ours or isinstance(error, MisconfigurationException):
            return str(error)
        if raised_in.name == "early_stopping.py" and isinstance(error, RuntimeError):
            return f"trainer.callbacks: {error}"
        error = error.__cause__
    return None
