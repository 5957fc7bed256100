"""The signals of a machine that is about to be taken: the step ends, a checkpoint is written, exit 143.

Schedulers send SIGTERM or SIGUSR1, a terminal that is closed SIGHUP.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from train.files.processes import STOPS


class TerminatedError(BaseException):
    """One of STOPS arrived. Like KeyboardInterrupt it is no Exception, so that nothing takes it for a fault."""


class Stopping:
    """Raises TerminatedError at one of STOPS; while it is :meth:`held`, when that block ends."""

    def __init__(self) -> None:
        self.requested, self._held = False, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In this block STOPS are heard, but for those that are ignored, as under nohup; call it from the main
        thread."""
        heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._arrived) for number in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self, hold: bool = True) -> Iterator[None]:
        """A block that STOPS do not cut; with ``hold`` False one, within such a block, that they do."""
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
