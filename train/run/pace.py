"""How fast a run is, and whether it is the loader or the model that sets the pace."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from kernels import nvtx

T = TypeVar("T")

STARVED = 0.3  # share of the time from which waiting for data is worth a hint


def waiting(batches: Iterable[T]) -> Iterator[T]:
    """The batches; the wait for each is a range in a profiler's timeline."""
    source = iter(batches)
    while True:
        with nvtx.span("data"):
            try:
                batch = next(source)
            except StopIteration:
                return
        yield batch


class Pace:
    """Of steps of ``images`` images each, without the first step, which starts the workers, and what is between
    steps."""

    def __init__(self, images: int) -> None:
        self.images, self.steps, self.waited, self.computed = images, -1, 0.0, 0.0
        self._ready = 0.0

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; the time that each took to come counts as waiting."""
        asked = time.perf_counter()
        for batch in waiting(batches):
            self._ready = time.perf_counter()
            if self.steps >= 0:
                self.waited += self._ready - asked
            yield batch
            asked = time.perf_counter()

    def step(self) -> None:
        """The step on the last batch has ended."""
        if self.steps >= 0:
            self.computed += time.perf_counter() - self._ready
        self.steps += 1

    @property
    def speed(self) -> float:
        """Images per second; 0 before the second step."""
        return self.images * self.steps / (self.waited + self.computed) if self.steps > 0 else 0.0

    @property
    def appetite(self) -> float:
        """Images per second that the model could take."""
        return self.images * self.steps / self.computed if self.steps > 0 else 0.0

    @property
    def hint(self) -> str:
        """What to do if the loader is too slow; "" if it is not."""
        if self.steps <= 0 or self.waited < STARVED * (self.waited + self.computed):
            return ""
        return (
            f"the loader gave {self.speed:.0f} images/s, and the model could take {self.appetite:.0f}: more --workers, "
            "or a --cache, may help"
        )
