"""One process at a time writes to the folder of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

if sys.platform != "win32":
    import fcntl

NAME = ".running"
"""Of the file that is locked. It means nothing without the lock, which ends with its process, in whatever way that ends."""
_occupied: dict[Path, int] = {}


def occupies(folder: Path) -> bool:
    """Whether no other process runs in a folder; then it is this one's until `leave`. On Windows nobody looks.

    The lock is one of POSIX records: workers of a data loader, which may outlive a killed run by seconds, do not inherit it. It
    is lost as soon as this process closes the file, however often it was opened: so nothing else may open it.
    """
    folder = folder.resolve()
    if sys.platform == "win32" or folder in _occupied:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            os.close(handle)
            return False
        except OSError as error:  # not every network's file system knows locks
            rank_zero_warn(f"{folder} cannot be locked ({error.strerror}), so do not start two runs in it.")
        if _is_still_there(handle, folder / NAME):
            _occupied[folder] = handle
            return True
        os.close(handle)  # it was deleted, by who left, before it was locked


def leave(folder: Path) -> None:
    """Let others run in a folder, if it was this process's."""
    folder = folder.resolve()
    if (handle := _occupied.pop(folder, None)) is not None:
        (folder / NAME).unlink(missing_ok=True)
        os.close(handle)


def refusal(folder: Path, key: str) -> ValueError:
    """What to say where `occupies` is false.

    Args:
        folder: the other process's.
        key: of the YAML that led there.
    """
    return ValueError(
        f"{key}: another process is running in {folder}, and two would write over each other. Wait for its end, or stop it; a run "
        "beside it needs another run_name, and another checkpoint.dirpath if that is set."
    )


def _is_still_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
