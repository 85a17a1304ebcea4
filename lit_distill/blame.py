"""Whose fault it is: exceptions become messages that begin with the YAML key of what was wrong, or say what to do."""

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

BUILDERS = ("__init__", "__post_init__")
ERRORS = (ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError, NotImplementedError)
"""What libraries raise at arguments that cannot be. A `MisconfigurationException` of Lightning is none of these."""
OF_THE_DISK = {
    errno.ENOSPC: "Make room on the disk; the last checkpoint is still good, and --ckpt_path last goes on from it.",
    errno.EDQUOT: "Your quota is used up; the last checkpoint is still good, and --ckpt_path last goes on from it.",
    errno.EROFS: "Give a folder that can be written.",
    errno.EACCES: "Give a folder that can be written.",
    errno.ENOENT: "Give a path that exists.",
    errno.ENOTDIR: "Give a folder that can be written.",
}
"""What to do about errors of the operating system that are nobody's mistake in the code."""
LOST_A_RANK = re.compile("closed by peer|reset by peer|Broken pipe|Timed out waiting|ncclRemoteError|NCCL.*timeout")
"""What gloo and NCCL say where another rank is no longer there."""

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
    except (*ERRORS, MisconfigurationException) as error:
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
    named = [name for name in re.findall(r"Trainer\((\w+)=", message) if name in options]
    named += [name for name in options if name in words]
    quoted = [name for name, value in options.items() if isinstance(value, str) and value in words]
    return f"trainer.{[*named, *quoted][0]}: {message}" if named or quoted else f"trainer: {message}"


def said_to_the_user(error: BaseException | None, packages: Sequence[Path]) -> str | None:
    """The message that was written for the reader of the YAML: the project's own, wrapped by others or not, or Lightning's.

    Args:
        error: what ended the run.
        packages: folders of the project's code.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            return f"{error.strerror}: {error.filename or 'while writing'}. {OF_THE_DISK[error.errno]}"
        if isinstance(error, RuntimeError) and LOST_A_RANK.search(str(error)):
            rank = getattr(rank_zero_only, "rank", 0)
            return (
                f"rank {rank} has lost another rank. What that one said stands above; one that was killed, as for want of memory, "
                "says nothing. --ckpt_path last goes on from the last checkpoint."
            )
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = isinstance(error, ValueError | OSError) and any(raised_in.is_relative_to(p) for p in packages)
        if ours or isinstance(error, MisconfigurationException):
            return str(error)
        if raised_in.name == "early_stopping.py" and isinstance(error, RuntimeError):
            return f"trainer.callbacks: {error}"
        error = error.__cause__
    return None


def _under_construction(frames: TracebackType | None) -> Iterator[tuple[type, Mapping[str, Any]]]:
    """The classes that were being instantiated, outermost first, with the variables of their constructors."""
    while frames is not None:
        frame = frames.tb_frame
        if frame.f_code.co_name in BUILDERS and "self" in frame.f_locals:
            yield type(frame.f_locals["self"]), frame.f_locals
        frames = frames.tb_next


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
