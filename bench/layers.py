"""One adapted FFN to be timed: its shape, its inputs, and the check that a peer computes the same."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.base import Forward, Layer, Peer, parts_of
from fastmoe_lora import adapt
from model import ViT, ViTConfig

TASKS = 5
L2_BYTES = 64 * 2**20  # at least the L2 of an H200; the rotating inputs take twice as much
# fp32 sums in another order; half precision rounds the experts' sum once or twice more.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Shape:
    """An FFN ``width`` wide over ``tokens`` tokens of five tasks, with the experts of ``config``."""

    width: int
    tokens: int
    config: str
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> str:
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}, width {self.width}, {self.tokens} tokens"


class Problem:
    """``layer``, an adapted FFN with a batch of five tasks open, and ``frozen``, a copy without experts. ``x`` and
    ``dy`` are several inputs in rotation, so that none stays in the L2."""

    def __init__(self, shape: Shape, kernel: str = "reference") -> None:
        torch.manual_seed(0)
        self.shape = shape
        vit: Any = ViT(ViTConfig(width=shape.width, depth=1, heads=1), 16).to(shape.device, shape.dtype)
        self.layer: Layer = vit.blocks[0].mlp
        self.frozen: Forward = copy.deepcopy(self.layer).requires_grad_(False)
        routing = adapt(vit, shape.config, TASKS, kernel=kernel)
        nn.init.normal_(self.layer.lora_B, std=0.02)
        nn.init.normal_(self.layer.routers, std=shape.width**-0.5)
        self.batch = routing.batch(self.counts)
        self.batch.__enter__()
        copies = max(2, -(-2 * L2_BYTES // (shape.tokens * shape.width * shape.dtype.itemsize)))
        if shape.device.type == "cpu":
            copies = 2
        make: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        self.x = [torch.randn(shape.tokens, shape.width, requires_grad=True, **make) for _ in range(copies)]
        self.dy = [torch.randn(shape.tokens, shape.width, **make) for _ in range(copies)]

    @property
    def counts(self) -> list[int]:
        return [self.shape.tokens // TASKS] * TASKS

    @property
    def parameters(self) -> list[Tensor]:
        return [self.layer.lora_A, self.layer.lora_B, self.layer.routers]

    @property
    def weights(self) -> list[Tensor]:
        """Every tensor that the layer keeps between steps."""
        return list(self.layer.parameters())

    def results(self, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """y and every gradient of the first input."""
        return _results(forward, [self.x[0], *self.parameters], self.dy[0])

    def exact(self, build: Callable[[Layer], Forward]) -> dict[str, Tensor]:
        """The same in fp64, from the same values."""
        layer = copy.deepcopy(self.layer).double()
        leaves = [self.x[0].detach().double().requires_grad_(), layer.lora_A, layer.lora_B, layer.routers]
        with parts_of(layer)[2].batch(self.counts):
            return _results(build(layer), leaves, self.dy[0].double())


def _results(forward: Callable[[Tensor], Tensor], leaves: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients of ``leaves``, which are zeros where a leaf gets none."""
    y = forward(leaves[0])
    given = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, given, strict=True)]
    return dict(zip(("y", "dx", "dA", "dB", "dW"), (y.detach(), *filled), strict=True))


def errors(actual: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference relative to the norm of the right value."""
    return {
        name: ((actual[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)).item()
        for name, value in right.items()
    }


def check(peer: Peer, problem: Problem) -> None:
    """AssertionError with the peer and the quantity where a peer differs from what it must equal."""
    expected, actual = (problem.results(build(problem.layer)) for build in (peer.reference, peer.build))
    limit = TOLERANCE[problem.shape.dtype]
    for name, error in errors(actual, expected).items():
        assert error <= limit, f"{peer.name} is wrong: its {name} is off by {error:.1e}"
