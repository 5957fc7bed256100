"""GEMMs over tokens whose weights come in sets: one set for all rows, or a set for each run of rows.

One set is one GEMM, a run for each set and all of equal length are one batched GEMM, other runs are a GEMM each. With
several gates per token the runs repeat: run i has set i modulo the number of sets.
"""

from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

Runs = tuple[int, ...]


def runs_of(rows: int, sets: int, counts: Runs) -> Runs:
    """The runs that ``rows`` rows consist of: all of them for one set, else ``counts``, repeated."""
    return (rows,) if sets == 1 else counts * max(rows // max(sum(counts), 1), 1)


def _batched(runs: Runs, sets: int) -> bool:
    return len(runs) == sets > 1 and len(set(runs)) == 1


def product(x: Tensor, weights: Tensor, counts: Runs, bias: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """x W (rows, n) of x (rows, k), W from ``weights`` (sets, k, n); plus ``bias`` (sets, n) or ``base`` (rows, n)."""
    sets, runs = len(weights), runs_of(len(x), len(weights), counts)
    if _batched(runs, sets):
        by_set = sets, runs[0]
        tokens = x.unflatten(0, by_set)
        if bias is not None:
            return torch.baddbmm(bias[:, None], tokens, weights).flatten(0, 1)
        if base is not None:
            return torch.baddbmm(base.unflatten(0, by_set), tokens, weights).flatten(0, 1)
        return torch.bmm(tokens, weights).flatten(0, 1)
    y = x.new_empty(len(x), weights.shape[2])
    starts: Sequence[Tensor] | None = None if base is None else base.split(runs)
    if bias is not None:
        starts = bias.repeat(len(runs) // sets, 1).unbind()
    for i, (tokens, weight, out) in enumerate(zip(x.split(runs), cycle(weights), y.split(runs), strict=False)):
        if starts is None:
            torch.mm(tokens, weight, out=out)
        else:
            torch.addmm(starts[i], tokens, weight, out=out)
    return y


def product_backward(left: Tensor, right: Tensor, sets: int, counts: Runs) -> Tensor:
    """(sets, m, n): left^T right over the rows of each set, of left (rows, m) and right (rows, n)."""
    runs = runs_of(len(left), sets, counts)
    if sets == 1:
        return torch.mm(left.t(), right)[None]
    if _batched(runs, sets):
        return torch.bmm(left.unflatten(0, (sets, runs[0])).mT, right.unflatten(0, (sets, runs[0])))
    total = left.new_zeros(sets, left.shape[1], right.shape[1])
    for rows, columns, out in zip(left.split(runs), right.split(runs), cycle(total), strict=False):
        out.addmm_(rows.t(), columns)
    return total


def sums(x: Tensor, sets: int, counts: Runs) -> Tensor:
    """(sets, n) fp32: the sum over the rows of each set, of x (rows, n)."""
    return torch.stack([run.sum(0, dtype=torch.float32) for run in x.split(runs_of(len(x), sets, counts))])
