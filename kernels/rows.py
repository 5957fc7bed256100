"""Which rows of a token matrix belong to which task."""

from dataclasses import dataclass
from functools import lru_cache

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
    @lru_cache(maxsize=64)
    def of(counts: tuple[int, ...], device: torch.device) -> "TaskRows":
        """The rows of one batch composition; cached, since a training run has only a few compositions."""
        boundaries = [sum(counts[:t]) for t in range(len(counts) + 1)]
        with torch.inference_mode(False):  # an evaluation may come first, and training must be able to save them
            return TaskRows(counts, torch.tensor(boundaries, dtype=torch.int32, device=device))
