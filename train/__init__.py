"""Training, evaluation and prediction: what users run."""

import sys
from types import TracebackType


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says "interrupted" where an interrupt ends a command, and shows every other exception as usual."""
    if kind is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# A command takes a second to import its libraries, before it can handle an interrupt itself.
if sys.argv[:1] == ["-m"]:  # what Python puts there until it has found the module of ``python -m``
    sys.excepthook = _quiet
