"""Files and folders that appear under their names whole, or not at all.

Each writer works on a hidden partial beside the final path, ``.NAME.<random>.partial``, and renames it at the end. The
random part is a writer's alone, so that any number of processes, on any number of machines, may write the same path:
the last rename wins. A process that is killed leaves its partial, which no reader looks at.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kernels.errors import UserError


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yields a partial path to write; it replaces the file or link ``path`` when the block ends without exception.

    The partial does not have the suffix of ``path``: name the format to a writer that guesses it. After an exception
    ``path`` is what it was before. With ``sync`` the new content survives a power cut; without, which is faster for
    many small files, only a kill of the process.

    Raises:
        UserError: the block, or the rename, raised an OSError: the disk is full, read-only or the like.
    """
    partial = _partial(path)
    with _one_line(path):
        try:
            yield partial
            if sync:
                _sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    if sync:
        _sync_names(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields an empty partial folder to fill; it becomes ``path`` when the block ends without exception.

    An earlier folder ``path`` is moved aside just before and deleted after. Everything in the folder is synced to the
    disk before it gets its name, so the block may write its files directly. Missing parents of ``path`` are made.

    Raises:
        UserError: the block, or a rename, raised an OSError: the disk is full, read-only or the like.
    """
    partial, old = _partial(path), _partial(path)
    with _one_line(path):
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
    _sync_names(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """``text`` in UTF-8 as the whole content of ``path``; raises as :func:`replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON; raises as :func:`replacing` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def make_folder(path: Path) -> Path:
    """The folder ``path``, made with its parents if need be; UserError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another --out") from None
    return path


def remove_partials(folder: Path, name: str) -> None:
    """Deletes what killed writers left of the files and folders in ``folder`` that match the glob pattern ``name``.

    For an owner of the folder only: the partial of a writer that still works would go too.
    """
    for partial in folder.glob(f".{name}.*.partial"):
        shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room there, or write elsewhere" if full else "write elsewhere, or make the place writable"
        raise UserError(f"cannot write {path} ({error.strerror or error}): {remedy}") from error


def _sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_names(folder: Path) -> None:
    """:func:`_sync` of a folder after a rename. The file stands by then, and some network disks cannot sync folders."""
    with suppress(OSError):
        _sync(folder)
