"""Which rows of a token matrix belong to which task: one segment of consecutive rows per task."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TaskSegments:
    """Task t owns the rows ``offsets[t] * length .. offsets[t + 1] * length``; it may have none.

    ``offsets`` (tasks + 1, int32) is on the device of the tokens. ``counts`` are the rows of every task on the host,
    where they are known: a compiled pass does not read them, so that one graph serves every composition of a batch.
    """

    offsets: Tensor
    tasks: int
    counts: tuple[int, ...] | None = None
    length: int = 1

    @staticmethod
    def of(counts: tuple[int, ...], device: torch.device) -> "TaskSegments":
        """The segments of ``counts`` rows per task."""
        return TaskSegments(offsets_of(counts, device), len(counts), counts)

    def blocks(self, rows: int, block: int) -> int:
        """At least as many blocks of ``block`` rows as ``rows`` rows in segments need; no block spans two tasks."""
        return (rows + self.tasks * (block - 1)) // block

    def task_of_rows(self, rows: int) -> Tensor:
        """The task of each of ``rows`` rows, int64, on the device; a pass of any composition computes the same."""
        number = torch.arange(rows, device=self.offsets.device)
        return torch.bucketize(number, self.offsets[1:-1] * self.length, right=True)


def offsets_of(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(tasks + 1,) int32: the exclusive prefix sums of ``counts``, made on ``device`` from the numbers alone.

    Nothing is copied from the host, which would wait, and which a CUDA graph would repeat from memory long reused.
    """
    with torch.inference_mode(False):  # backward cannot save tensors of inference mode
        if all(count == counts[0] for count in counts):  # also symbols, under torch.export
            return torch.arange(len(counts) + 1, dtype=torch.int32, device=device) * counts[0]
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int32, device=device)
        for task, count in enumerate(counts):
            offsets[task + 1 :] += count
        return offsets
