"""Which rows of a token matrix belong to which task: one segment of consecutive rows per task."""

from dataclasses import dataclass

import torch
from torch import Tensor


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes ten times as long on the host."""
    return -(-a // b)


@dataclass(frozen=True, eq=False)
class TaskSegments:
    """Task t owns ``counts[t]`` consecutive rows, 0 if it has no token in this step.

    ``counts`` is on the host, so that shapes are static and nothing waits for the device. ``offsets`` (tasks + 1,
    int32) holds the same boundaries on the device, where the kernels read them.
    """

    counts: tuple[int, ...]
    offsets: Tensor

    def grid(self, block: int) -> tuple[int, int]:
        """(blocks of the longest task, tasks): a launch grid whose blocks of ``block`` rows never span two tasks."""
        return ceil_div(max(self.counts), block), len(self.counts)

    @staticmethod
    def of(counts: tuple[int, ...], device: torch.device) -> "TaskSegments":
        """The segments of one batch composition on ``device``.

        They are built once per composition, of which a training run has only a few. They are kept in a dict because
        torch.compile traces through functools.cache and would rebuild them.
        """
        if (counts, device) not in _KNOWN:
            boundaries = [sum(counts[:t]) for t in range(len(counts) + 1)]
            with torch.inference_mode(False):  # the first user may be an evaluation; backward cannot save its tensors
                offsets = torch.tensor(boundaries, dtype=torch.int32, device=device)
            _KNOWN[counts, device] = TaskSegments(counts, offsets)
        return _KNOWN[counts, device]


_KNOWN: dict[tuple[tuple[int, ...], torch.device], TaskSegments] = {}
