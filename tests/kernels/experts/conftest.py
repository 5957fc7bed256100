"""Small mixtures of experts of every kind, and problems of the grouped algorithm, on memory that holds NaN until it is
written. As fixtures: under --import-mode=importlib the tests cannot import this."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels import Experts, Gating, TaskSegments, expert_mixture


@dataclass
class Mixture:
    """One call of the operation. ``leaves`` are x, base, z, A, B, b and c by name, without those that are absent."""

    gating: Gating
    activation: str
    counts: tuple[int, ...]
    leaves: dict[str, Tensor]

    def to(self, dtype: torch.dtype) -> "Mixture":
        """New leaves of that type; z is at least fp32."""
        exact = torch.promote_types(dtype, torch.float32)
        typed = {name: t.detach().to(exact if name == "z" else dtype) for name, t in self.leaves.items()}
        return replace(self, leaves={name: t.clone().requires_grad_() for name, t in typed.items()})

    @property
    def experts(self) -> Experts:
        down, up, *biases = (self.leaves.get(name) for name in ("A", "B", "b", "c"))
        return Experts(down, up, *biases, self.activation)

    def run(self, kernel: str, algorithm: str = "") -> tuple[Tensor, Tensor, Tensor]:
        t = self.leaves
        segments = TaskSegments.of(self.counts, t["x"].device)
        return expert_mixture(t["x"], t.get("base"), self.experts, t["z"], segments, self.gating, kernel, algorithm)

    def cotangents(self) -> tuple[Tensor, Tensor]:
        """Gradients of a loss by y and P, representable in fp16; neither drowns the other in dz."""
        z, up = self.leaves["z"], self.leaves["B"]
        rng = torch.Generator().manual_seed(1)
        dy = torch.randn(*z.shape[:-1], up.shape[1], generator=rng).half()
        dp = torch.randn(*z.shape[:-2], len(self.counts), z.shape[-1], generator=rng) * sum(self.counts)
        return dy.to(self.leaves["x"]), dp.half().to(z)

    def everything(self, kernel: str, algorithm: str = "") -> dict[str, Tensor]:
        """y, g, P and the gradients of all leaves."""
        y, g, p = self.run(kernel, algorithm)
        gradients = torch.autograd.grad((y, p), list(self.leaves.values()), self.cotangents())
        names = ("y", "g", "P", *(f"d{name}" for name in self.leaves))
        return dict(zip(names, (y.detach(), g, p.detach(), *gradients), strict=True))


def _make(
    gating: str = "ase",
    experts: int = 6,
    rank: int = 3,
    counts: tuple[int, ...] = (4, 0, 5),
    sets: int = 1,
    readers: int = 0,
    biases: str = "bc",
    activation: str = "gelu",
    widths: tuple[int, int] = (10, 7),
) -> Mixture:
    """fp64 leaves whose values are exact in fp16. ``readers`` is G, 0 for z (T, C); ``biases`` names those present."""
    chosen = Gating(gating, 2, {"ase": 2, "naive-shared": 1}.get(gating, 0))
    rng = torch.Generator().manual_seed(0)
    (d, width), tokens = widths, sum(counts)
    lead = (readers,) if readers else ()

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=rng)).half().double().requires_grad_()

    leaves = {
        "x": normal(tokens, d),
        "base": normal(*lead, tokens, width),
        "z": normal(*lead, tokens, chosen.router_columns(experts), scale=1.5),
        "A": normal(sets, experts * rank, d, scale=d**-0.5),
        "B": normal(sets, width, experts * rank),
    }
    if "b" in biases:
        leaves["b"] = normal(sets, experts * rank)
    if "c" in biases:
        leaves["c"] = normal(sets, experts, width)
    return Mixture(chosen, activation, counts, leaves)


@pytest.fixture(scope="session")
def make_mixture():
    """make_mixture(gating=, experts=, rank=, counts=, sets=, readers=, biases=, activation=, widths=) -> Mixture"""
    return _make


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of the grouped algorithm in fp64. base, g and dy are (G, T, ..)."""

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
