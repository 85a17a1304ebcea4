"""Turns exceptions into messages that start with the YAML key, or that say what to do."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_distill.distributed.ranks import LOST_A_RANK

BUILDERS = ("__init__", "__post_init__")
ERRORS = (ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError, NotImplementedError)
"""What libraries raise for wrong arguments. Lightning's `MisconfigurationException` is a subclass of none of these."""
DISK_ERRORS = {
    errno.ENOSPC: "Free some disk space; the last checkpoint is still good, and --ckpt_path last resumes from it.",
    errno.EDQUOT: "Your disk quota is used up; the last checkpoint is still good, and --ckpt_path last resumes from it.",
    errno.EROFS: "Give a folder that can be written.",
    errno.EACCES: "Give a folder that can be written.",
    errno.ENOENT: "Give a path that exists.",
    errno.ENOTDIR: "Give a folder that can be written.",
}
"""What the user can do about errors of the operating system that are not bugs."""
_NAMED = re.compile(r"(?P<first>[A-Za-z_]\w*)(?P<rest>(\.\w+)*)(?=:| must)")
_DECODING_PREFIX = re.compile(r"^decoding\.")


@contextmanager
def attach_config_keys(config: Mapping[str, Any], keys: Mapping[type, str]) -> Iterator[None]:
    """Turn errors of constructors in this context into a ValueError with the key of their part of ``config``.

    Args:
        config: the parsed config: dictionaries, with ``class_path`` and ``init_args`` where a class can be chosen.
        keys: the keys of classes that have a fixed key and no ``class_path``.

    Raises:
        ValueError: with the key; an error that belongs to no part of ``config`` is raised unchanged.
    """
    try:
        yield
    except (*ERRORS, MisconfigurationException) as error:
        for cause in _causes(error):
            for kind, given in reversed(list(_constructor_calls(cause.__traceback__))):
                if where := _place(kind, given, config, keys):
                    raise ValueError(_with_key(str(cause), where, kind, roots=set(config))) from error
        raise


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


def _constructor_calls(frames: TracebackType | None) -> Iterator[tuple[type, Mapping[str, Any]]]:
    """The classes whose constructors are in the traceback, outermost first, with the constructors' local variables."""
    while frames is not None:
        frame = frames.tb_frame
        if frame.f_code.co_name in BUILDERS and "self" in frame.f_locals:
            yield type(frame.f_locals["self"]), frame.f_locals
        frames = frames.tb_next


def _place(kind: type, given: Mapping[str, Any], config: Mapping[str, Any], keys: Mapping[type, str]) -> str | None:
    """The key of the class ``kind`` in the config; if it occurs several times, the one with the same arguments."""
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
    message = _DECODING_PREFIX.sub("", message)
    named = _NAMED.match(message)
    if named and (named["first"] in roots or named["first"] == kind.__name__) and named["rest"]:
        return message  # the message has its key already
    if named and not named["rest"] and named["first"] != kind.__name__:
        return f"{key}{arguments}.{message}"
    return f"{key}: {message}" if kind.__name__ in message else f"{key}: {kind.__name__}: {message}"
