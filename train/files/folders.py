"""The folder that a command writes to. One rule for all commands:

A data set is only read. A file belongs to the command that wrote it, which OUT/.written says, and no other command, nor
the same one for another subject, replaces it. Without --out a command makes a folder that did not exist.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from kernels.errors import UserError
from train.files.atomic import make_folder, write_text, writing

MARKS = ("JPEGImages", "gt_sets", "leftImg8bit")  # folders of PASCAL-Context, of NYUD-v2 and of Cityscapes
RECORD = ".written"  # lines "name <tab> owner"
_held: list[IO[str]] = []  # locks of the folders that this process has claimed


def claim(
    given: str | Path, owner: str, names: Iterable[str], default: str = "", adopt: bool = False, alone: bool = True
) -> Path:
    """The folder ``given``, in which ``owner`` may from now on write the files and folders ``names``.

    Without ``given`` it is the first of ``default``, ``default``-2, ... that does not exist. With ``alone`` no other
    command gets it before the end of the block :func:`holding`. UserError as :func:`require_own`, and where the folder
    cannot be made or written, or another process has it.
    """
    names = tuple(names)
    if given:
        require_own(Path(given), owner, names, adopt)
    out = make_folder(Path(given)) if given else _new_folder(Path(default))
    if given and alone:
        _held.append(lock(out))
        require_own(out, owner, names, adopt)  # another command may have come in between
    before = read_record(out)
    if (record := before | dict.fromkeys(names, owner)) != before:
        write_text(out / RECORD, "".join(f"{name}\t{writer}\n" for name, writer in record.items()))
    return out


@contextmanager
def holding() -> Iterator[None]:
    """A block, such as a command, at whose end other processes may claim the folders that it has claimed."""
    before = len(_held)
    try:
        yield
    finally:
        for file in _held[before:]:
            file.close()
        del _held[before:]


def require_own(out: Path, owner: str, names: Iterable[str], adopt: bool = False) -> None:
    """UserError where ``out`` lies in a data set, or holds one of ``names`` that ``owner`` did not write.

    ``adopt``: what a folder without any record of ``owner`` holds counts as written by it.
    """
    require_outside_data(out)
    recorded = read_record(out)
    if adopt and owner not in recorded.values():
        return
    with writing(out):
        found = set(os.listdir(out)) if out.is_dir() else set()
    for name in names:
        if name in found and recorded.get(name) != owner:
            by = f"was written by {recorded[name]}, not" if name in recorded else "was not written"
            raise UserError(f"{out / name} {by} by {owner}: move it away, or choose another --out")


def read_record(out: Path) -> dict[str, str]:
    """{name: the command that wrote it}; {} for a folder that no command claimed."""
    with writing(out):
        if not (out / RECORD).is_file():
            return {}
        lines = (out / RECORD).read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: owner for name, tab, owner in (line.partition("\t") for line in lines) if tab}


def _new_folder(base: Path) -> Path:
    require_outside_data(base)
    make_folder(base.parent)
    for n in count(1):
        out = base if n == 1 else base.with_name(f"{base.name}-{n}")
        with writing(out), suppress(FileExistsError):
            out.mkdir()
            return out
    raise AssertionError("count() does not end")


def require_new(path: Path, flag: str) -> None:
    """UserError where ``path``, which ``flag`` gave, lies in a data set or exists."""
    require_outside_data(path, flag)
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and is not overwritten: choose another {flag}")


def require_outside_data(path: Path, flag: str = "--out") -> None:
    """UserError where ``path`` is a data set's root or lies in one: a folder with one of MARKS is only read."""
    real = resolved(path)
    with writing(path):
        for folder in (real, *real.parents):
            if any((folder / mark).is_dir() for mark in MARKS):
                raise UserError(f"{path} lies inside the data set {folder}, which is only read: choose another {flag}")


def walk_files(folder: Path) -> Iterator[Path]:
    """All files below ``folder``, sorted, in linked folders too, each once. Hidden files, and folders that a command
    has written, are left out. UserError where a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable, or remove it")

    entered: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in entered or (RECORD in names and place != str(folder)):
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = sorted(name for name in names if not name.startswith("."))
        yield from (file for name in visible if (file := Path(place, name)).is_file())


def resolved(path: Path) -> Path:
    """``path.resolve()``, also of a link that points at itself, for which Python before 3.13 raises RuntimeError."""
    return Path(os.path.realpath(path))


def lock(folder: Path) -> IO[str]:
    """An exclusive lock on ``folder``, which lasts until the returned file is closed or its process ends.

    UserError where another process holds it, or the folder cannot be written. On a file system without locks there is
    none.
    """
    with writing(folder / ".lock"):
        file = (folder / ".lock").open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process alone: its workers do not hold it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(f"another command (process {holder}) writes to {folder}: choose another --out") from None
        except OSError:
            return file
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return file
