"""SIGTERM, which a scheduler sends before it takes the machine: the step ends, a checkpoint is written, exit 143."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TerminatedError(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it is no Exception, so that nothing takes it for a fault."""


class Stopping:
    """Raises TerminatedError at SIGTERM; while it is :meth:`held`, when that block ends."""

    def __init__(self) -> None:
        self.requested, self._held = False, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In this block SIGTERM is heard; call it from the main thread."""
        previous = signal.signal(signal.SIGTERM, self._arrived)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    @contextmanager
    def held(self, hold: bool = True) -> Iterator[None]:
        """A block that SIGTERM does not cut; with ``hold`` False one, within such a block, that it does."""
        before, self._held = self._held, hold
        try:
            yield
        finally:
            self._held = before
        if self.requested:
            raise TerminatedError

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._held:
            raise TerminatedError
