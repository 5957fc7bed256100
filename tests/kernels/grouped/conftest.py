"""Problems of the grouped path, on memory that holds NaN until it is written."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import TaskSegments
from kernels.experts import Experts


@dataclass(frozen=True, eq=False)
class Problem:
    """One call in fp64. base, g and dy are (G, T, ..)."""

    x: Tensor
    base: Tensor
    experts: Experts
    g: Tensor
    segments: TaskSegments
    slots: int
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        """The values rounded to ``dtype``; gates and biases to fp32, if ``dtype`` is not wider."""
        wide = torch.promote_types(dtype, torch.float32)
        e = self.experts
        experts = replace(
            e,
            down=e.down.to(dtype),
            up=e.up.to(dtype),
            hidden_bias=None if e.hidden_bias is None else e.hidden_bias.to(wide),
            output_bias=None if e.output_bias is None else e.output_bias.to(wide),
        )
        tokens = {name: getattr(self, name).to(dtype) for name in ("x", "base", "dy")}
        return replace(self, experts=experts, g=self.g.to(wide), **tokens)


def _select(kind: str, rows: int, experts: int, slots: int, rng: torch.Generator) -> Tensor:
    selected = torch.zeros(rows, experts, dtype=torch.bool)
    if kind == "one expert":
        selected[:, experts // 2] = True
        return selected
    if kind == "first experts":  # the others own no block
        selected[:, :slots] = True
        return selected
    largest = torch.rand(rows, experts, generator=rng).topk(slots).indices
    selected.scatter_(1, largest, True)
    if kind == "ragged":
        selected &= torch.rand(rows, experts, generator=rng) < 0.5
    if kind == "too many":
        selected |= torch.rand(rows, experts, generator=rng) < 0.3
    return selected


def _make_problem(
    experts=4, slots=2, rank=16, counts=(30, 21), sets=1, gates=1, activation="none", biases=False, kind="k",
    widths=(24, 40), seed=0,
) -> Problem:  # fmt: skip
    rng, (d, width) = torch.Generator().manual_seed(seed), widths
    tokens, rows = sum(counts), gates * sum(counts)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    weights = Experts(
        d**-0.5 * normal(sets, experts * rank, d),
        rank**-0.5 * normal(sets, width, experts * rank),
        normal(sets, experts * rank) if biases else None,
        normal(sets, experts, width) if biases else None,
        activation,
    )
    selected = _select(kind, rows, experts, slots, rng)
    g = (0.1 + torch.rand(rows, experts, generator=rng, dtype=torch.float64)) * selected
    segments = TaskSegments.of(tuple(counts), torch.device("cpu"))
    base, g, dy = (t.unflatten(0, (gates, tokens)) for t in (normal(rows, width), g, normal(rows, width)))
    return Problem(normal(tokens, d), base, weights, g, segments, slots, dy)


@pytest.fixture(scope="session")
def make_problem():
    """make_problem(experts=4, slots=2, rank=16, counts=(30, 21), sets=1, gates=1, ...) -> Problem"""
    return _make_problem


@pytest.fixture(scope="session")
def select():
    """select("k" | "ragged" | "too many" | "one expert" | "first experts", rows, experts, slots, rng) -> (rows, N)"""
    return _select


@pytest.fixture(scope="package", autouse=True)
def uninitialised_memory_is_nan():
    """Whatever reads an empty place becomes NaN, or an index that is out of bounds."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
