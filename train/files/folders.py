"""The folder that a command writes to: outside data sets, and written by one run at a time."""

import fcntl
import os
from pathlib import Path
from typing import IO

from kernels.errors import UserError

MARKS = ("JPEGImages", "gt_sets")  # folders of PASCAL-Context and of NYUD-v2


def require_outside_data(out: Path) -> None:
    """UserError where ``out`` is a data set's root or lies in one: a folder with one of MARKS is only read."""
    path = out.resolve()
    for folder in (path, *path.parents):
        if any((folder / mark).is_dir() for mark in MARKS):
            raise UserError(f"{out} lies inside the data set {folder}, which is only read: choose another --out")


def lock(folder: Path) -> IO[str]:
    """An exclusive lock on ``folder``, which lasts until the returned file is closed or its process ends.

    UserError where another process holds it. On a file system without locks there is none.
    """
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process alone: its workers do not hold it
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise UserError(f"another run (process {holder}) writes to {folder}: choose another --out") from None
    except OSError:
        return file
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
