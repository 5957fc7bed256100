"""Atomic writes: a file or folder appears complete under its name, or not at all.

Each writer works on a hidden partial next to the final path, ``.NAME.<random>.partial``, and renames it at the end. The
random part is unique to the writer, so any number of processes, on any number of machines, may write the same path:
the last rename wins. A process that is killed leaves its partial, which no reader looks at, and which goes when a run
or, after an hour, another command writes to the folder again.
"""

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

from kernels.errors import UserError

HEX = "[0-9a-f]" * 32  # of uuid4, as a glob pattern
ABANDONED = 3600  # seconds without a write, after which the writer of a partial file is taken for dead
LONGEST = 200  # bytes of a name that its partial keeps: file systems take 255


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields a partial path to write; it replaces the file or link ``path`` when the block ends without exception.

    The partial does not have the suffix of ``path``: pass the format to writers that guess it from the suffix. After an
    exception ``path`` is unchanged. With ``sync`` the new content survives a power cut. Without, it survives only a
    kill of the process, but many small files are written faster.

    Raises:
        UserError: the block, or the rename, raised an OSError: the disk is full, read-only or the like.
    """
    partial = _partial(path)
    with writing(path):
        try:
            yield partial
            if sync:
                _sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    if sync:
        _sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields an empty partial folder to fill; it becomes ``path`` when the block ends without exception.

    An earlier folder ``path`` is moved aside just before and deleted after. Everything in the folder is synced to the
    disk before it gets its name, so the block may write its files directly. Missing parents of ``path`` are made.

    Raises:
        UserError: the block, or a rename, raised an OSError: the disk is full, read-only or the like.
    """
    partial, old = _partial(path), _partial(path)
    with writing(path):
        try:
            partial.mkdir(parents=True)
            yield partial
            for entry in (*partial.rglob("*"), partial):
                _sync(entry)
            with suppress(FileNotFoundError):
                path.rename(old)
            partial.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(partial, ignore_errors=True)
            raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """``text`` in UTF-8 as the whole content of ``path``; raises as :func:`replacing` does. What UTF-8 cannot hold, as
    in names of files, is escaped."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON; raises as :func:`replacing` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds lines to a file in UTF-8; UserError where the disk refuses. A kill may cut the last one short."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def whole_lines(path: Path) -> list[str]:
    """The lines of such a file, each with its end, but for one that was cut short. What is not UTF-8 becomes U+FFFD."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return [line for line in file if line.endswith("\n")]


def write_link(path: Path, name: str) -> None:
    """A link to ``name`` or, on a disk without links (exFAT, SMB, Google Drive), a file that holds ``name``."""
    with replacing(path) as partial:
        try:
            partial.symlink_to(name)
        except OSError:
            partial.write_text(f"{name}\n", encoding="utf-8")


def probe(folder: Path) -> None:
    """UserError unless ``folder`` takes what a checkpoint needs: files, folders, links, and their renaming."""
    trial = _partial(folder / "probe")
    try:
        with replacing_folder(trial) as partial:
            write_link(partial / "link", "file")
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def make_folder(path: Path) -> Path:
    """The folder ``path``, created with its parents if needed; UserError where it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another --out") from None
    _remove_abandoned(path)
    return path


@cache  # once for each folder that this process writes to
def _remove_abandoned(folder: Path) -> None:
    for partial in folder.glob(f".*.{HEX}.partial"):
        with suppress(OSError):  # another process may have removed it
            if partial.is_file() and time.time() - partial.stat().st_mtime > ABANDONED:
                partial.unlink()


def remove_folder(path: Path) -> None:
    """Deletes a folder, if it is there. A kill leaves the whole folder or a partial of it, and never half of it."""
    with suppress(OSError):
        shutil.rmtree(path.rename(_partial(path)))


def remove_partials(folder: Path, name: str) -> None:
    """Deletes the partials that killed writers left in ``folder``, for names that match the glob pattern ``name``.

    Use it only where no other process writes to ``folder``: it also deletes the partials of running writers.
    """
    for partial in folder.glob(f".{name}.{HEX}.partial"):
        shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    start = os.fsdecode(os.fsencode(path.name)[:LONGEST])
    return path.with_name(f".{start}.{uuid.uuid4().hex}.partial")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a UserError of one line with ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space there, or write elsewhere" if full else "write elsewhere, or make it writable"
        raise UserError(f"cannot write {path} ({error.strerror or error}): {remedy}") from error


def _sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk.

    Errors of folders and links are ignored: SMB, VirtualBox and some others sync files only.
    """
    with suppress(OSError) if path.is_dir() or path.is_symlink() else nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
