"""Which rows of a token matrix belong to which task."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TaskRows:
    """Tokens are task-major: task t owns ``counts[t]`` consecutive rows, 0 where it has none in this step.

    ``counts`` lives on the host, so shapes are static and nothing waits for the device; ``offsets``
    (tasks + 1, int32) holds the same boundaries on the device, where the kernels read them.
    """

    counts: tuple[int, ...]
    offsets: Tensor

    def grid(self, block: int) -> tuple[int, int]:
        """(blocks of the longest task, tasks): a launch grid in which no block of ``block`` rows has two tasks."""
        return -(-max(self.counts) // block), len(self.counts)

    @staticmethod
    def of(counts: tuple[int, ...], device: torch.device) -> "TaskRows":
        """The rows of one batch composition. They are made once: a training run has only a few compositions, and
        torch.compile finds in a dict what it could only remake behind functools.cache."""
        if (counts, device) not in _KNOWN:
            boundaries = [sum(counts[:t]) for t in range(len(counts) + 1)]
            with torch.inference_mode(False):  # an evaluation may come first, and training must be able to save them
                offsets = torch.tensor(boundaries, dtype=torch.int32, device=device)
            _KNOWN[counts, device] = TaskRows(counts, offsets)
        return _KNOWN[counts, device]


_KNOWN: dict[tuple[tuple[int, ...], torch.device], TaskRows] = {}
