"""Files and folders that are whole or not there at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under another name, and give it its own when all of it is on the disk."""
    unfinished = unfinished_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(unfinished)
        publish(unfinished, path)
    except BaseException:
        remove(unfinished)
        raise


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
