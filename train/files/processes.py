"""A pool of processes: ordered results, few jobs in flight, one line when one is killed. When processes end."""

import ctypes
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from threading import Thread
from types import ModuleType
from typing import Any

from kernels.errors import UserError

PR_SET_PDEATHSIG = 1
STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # of schedulers, and of a terminal that is closed

OrderedMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextmanager
def process_map(workers: int, purpose: str, preload: str) -> Iterator[OrderedMap]:
    """Yields ``map(function, items)``, which calls ``function`` in ``workers`` processes; 0 means this process.

    Results come in the order of ``items``. At most 2 x ``workers`` items are in flight, so the iterable may produce
    large items one by one. Function and items have to be picklable.

    The processes are forked from a server that is started afresh, since a fork of this process would copy locks that
    other threads hold. The server imports the module ``preload`` once for all of them. Workers ignore
    interrupts, which this process handles. At the end of the block, jobs that have not started are dropped.
    Call it from the main thread.

    Args:
        purpose: what a process does, for the message: "inspects the images".

    Raises:
        UserError: a process was killed.
    """
    if not workers:
        yield map
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignore)
    try:
        yield partial(_map_ordered, partial(_submit, pool), 2 * workers)
    except BrokenProcessPool:
        raise _killed(purpose) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _killed(purpose: str) -> UserError:
    return UserError(f"a process that {purpose} was killed, perhaps for lack of memory: use fewer --workers")


@contextmanager
def killed_workers() -> Iterator[None]:
    """Turns torch's error on a worker of a DataLoader that was killed into a UserError of one line.

    Torch's handler of SIGCHLD raises it, wherever the program is.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or it raises again, in a destructor, when the others end
        raise _killed("prepares batches") from error


def end_with_parent(number: int) -> None:
    """On Linux this process gets the signal ``number`` when the one that started it ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def stop_for_parent_alone(parent: int) -> None:
    """On Linux STOPS end this process where ``parent`` sends them. Those to a whole group or container are left to the
    parent, which may need this process for what it does before it ends."""
    if sys.platform != "linux":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def wait() -> None:
        while (arrived := signal.sigwaitinfo(STOPS)) and arrived.si_pid != parent:
            pass
        os._exit(0)

    Thread(target=wait, daemon=True).start()


def _submit(pool: ProcessPoolExecutor, function: Callable[[Any], Any], item: Any) -> Future[Any]:
    """``pool.submit``, which starts a process while there are too few; an interrupt takes effect after it.

    An interrupt inside would leave a process that the pool does not know of. It would take another's message to stop,
    and the end of the block would wait for the other for ever. A process starts with interrupts blocked, since one
    that arrives before the initializer is a traceback.
    """
    arrived: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the server of processes inherits it
    try:
        with _main_if_needed(function, item):
            return pool.submit(function, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, previous)
        if arrived:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _main_if_needed(function: Callable[[Any], Any], item: Any) -> Iterator[None]:
    """A process that starts in this block imports the main module only if ``function`` or ``item`` are defined there.

    It would run a script that calls a command without ``if __name__ == "__main__"`` once more, and cannot import what
    came from stdin.
    """
    main = sys.modules["__main__"]
    if b"__main__" not in pickle.dumps((function, item)):
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _map_ordered(
    submit: Callable[[Callable[[Any], Any], Any], Future[Any]],
    limit: int,
    function: Callable[[Any], Any],
    items: Iterable[Any],
) -> Iterator[Any]:
    """Results in order, with ``limit`` items submitted and not yet returned."""
    pending: deque[Future[Any]] = deque()
    for item in items:
        pending.append(submit(function, item))
        if len(pending) == limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
