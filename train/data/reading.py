"""One broken file, one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernels.errors import UserError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a decoder raises on a broken file, each its own kinds of error, into one line with the path."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} cannot be read ({reason}): restore the file") from error
