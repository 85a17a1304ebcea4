"""Files and folders that are whole or not there at all, whenever the process or the machine stops."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = 2**20
"""Bytes that are left on a full disk at most."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under another name, and give it its own when all of it is on the disk."""
    unfinished = unfinished_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming_a_full_disk(unfinished):
            write(unfinished)
        publish(unfinished, path)
    except BaseException:
        remove(unfinished)
        raise


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Let a write that failed for want of room say so: libraries that write tensors have errors of their own for it.

    Raises:
        OSError: with the number of the operating system's error.
    """
    try:
        yield
    except Exception as error:
        no_room = shutil.disk_usage(path.parent).free < NO_ROOM
        if isinstance(error, OSError) or not no_room:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a file of text; half of a surrogate pair, which a model may say, becomes a question mark."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8", errors="replace"))


def publish(unfinished: Path, path: Path) -> None:
    """Give a complete file or folder its name, in the place of what had it before."""
    for file in [unfinished, *unfinished.glob("*")]:
        flush(file)
    old = path.with_name(f".{path.name}.old")
    if path.is_dir() or (unfinished.is_dir() and path.exists()):  # a folder and a file cannot change places in one step
        remove(old)
        path.rename(old)
    unfinished.replace(path)
    flush(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file or a folder's list of files is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unfinished_name(path: Path) -> Path:
    """Where what is to become ``path`` is made; no pattern for checkpoints finds it."""
    return path.with_name(f".{path.name}.unfinished")
