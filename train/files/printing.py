"""Text on any stdout: encodings that lack a character, readers that leave. Needs the standard library alone."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    """``text`` as one line. What names of files may hold, but terminals should not get, is escaped: line ends, say."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


@contextmanager
def printing() -> Iterator[None]:
    """A block that may print any text, for a reader that may leave.

    What stdout cannot encode, such as a name that is no UTF-8, is escaped. SystemExit with the status of SIGPIPE, 141,
    where the reader of a pipe has closed it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(128 + signal.SIGPIPE) from None
