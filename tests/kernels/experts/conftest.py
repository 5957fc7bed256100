"""Small mixtures of experts of every kind, as fixtures: under --import-mode=importlib the tests cannot import this."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import Gating, TaskSegments
from kernels.experts import Experts, expert_mixture


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
