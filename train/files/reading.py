"""Turns errors on broken files into one line each."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernels.errors import UserError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns any exception that a decoder raises on a broken file into a UserError of one line with the path.

    A decoder's warning counts as an error, since its result is then partly a guess.
    """
    try:
        with warnings.catch_warnings():
            for category in (UserWarning, RuntimeWarning):  # scipy's and Pillow's
                warnings.simplefilter("error", category)
            yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} cannot be read ({reason}): restore it") from error


def require_file(path: Path) -> None:
    """UserError where ``path`` is a folder, a pipe (reading it would block) or a broken link."""
    with reading(path):
        if not path.is_file():
            raise UserError(f"{path} is not a file: restore it")
