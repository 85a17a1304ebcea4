"""Atomic writes of files and folders, and the lock of a run's folder."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

FULL_DISK_BYTES = 2**20
"""A disk with less free space than this counts as full."""


def atomic_write(path: Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """Write a file under a temporary name with ``write``, and rename it to ``path`` once it is complete and on the disk.

    Args:
        path: the file; its folder is created if needed.
        write: writes the content to the path that it gets.
        shared: whether other processes may write the same file at the same time; the last one wins.
    """
    unfinished = temporary_path(path.with_name(f"{path.name}.{os.getpid()}") if shared else path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with report_full_disk(unfinished):
            write(unfinished)
        commit(unfinished, path)
    except BaseException:
        remove(unfinished)
        raise


@contextmanager
def report_full_disk(path: Path) -> Iterator[None]:
    """Raise ENOSPC when a write fails on a full disk: libraries that write tensors raise errors of their own instead.

    Raises:
        OSError: with the errno of the operating system.
    """
    try:
        yield
    except Exception as error:
        disk_is_full = shutil.disk_usage(path.parent).free < FULL_DISK_BYTES
        if isinstance(error, OSError) or not disk_is_full:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file; a lone surrogate, which a model may generate, becomes a question mark."""
    atomic_write(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8", errors="replace"))


def commit(unfinished: Path, path: Path) -> None:
    """Rename a complete file or folder to its final name, and replace what was there before."""
    for file in [unfinished, *unfinished.glob("*")]:
        flush(file)
    old = path.with_name(f".{path.name}.old")
    if path.is_dir() or (unfinished.is_dir() and path.exists()):  # a folder cannot be replaced in one step
        remove(old)
        path.rename(old)
    unfinished.replace(path)
    flush(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    """The name under which ``path`` is written until it is complete; no search pattern for checkpoints matches it."""
    return path.with_name(f".{path.name}.unfinished")


LOCK_FILE = ".running"
"""The lock file of a folder. The file alone means nothing: the lock ends with its process, even if that is killed."""
_locks: dict[Path, FileLock] = {}


def acquire_lock(file: Path) -> bool:
    """Lock a file, whose only purpose this is, for this process until `release_lock`; its workers do not inherit the lock.

    Returns:
        Whether this process has the lock; False if another process has it.
    """
    file = file.resolve()
    if file in _locks:
        return True
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return False
    except OSError as error:  # some network file systems have no locks
        rank_zero_warn(f"{file} cannot be locked ({error.strerror}). Make sure that no second run writes there.")
    _locks[file] = lock
    return True


def release_lock(file: Path) -> None:
    """Release the lock of a file, and delete it, if this process has it."""
    file = file.resolve()
    if lock := _locks.pop(file, None):
        if sys.platform != "win32":  # where a file in use cannot be deleted; there it stays
            file.unlink(missing_ok=True)
        lock.release()


def lock_error(folder: Path, key: str) -> ValueError:
    """The error for a folder that another process has locked.

    Args:
        folder: the locked folder.
        key: the YAML key that points to it.
    """
    return ValueError(
        f"{key}: another process is running in {folder}, and two runs would overwrite each other's files. Wait until it ends, or "
        "stop it; a second run at the same time needs another run_name, and another checkpoint.dirpath if that is set."
    )
