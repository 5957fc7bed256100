"""Models the time of the adapted FFN over that of the frozen one, from the launches of both.

Launches are recorded by running both on tensors without memory. A GEMM of cuBLAS costs its operations at an assumed
rate. PyTorch's GELU costs the instructions of its formula and its bytes, and any other operator of PyTorch a fixed
time. Our launches cost what :mod:`bench.static.model` says. Every launch has a gap before it. The host's time and the
packing of weights are not modelled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.aot import DTYPES, WIDTH, Launch, recording
from bench.launches import AdaptedFFN, parse_pool
from bench.static.constants import CONSTANTS, RATES, Constants
from bench.static.model import TARGET, Cost, cost, power_sum
from kernels.segments import TaskSegments

PRODUCTS = {"mm": 0, "linear": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}  # position of the left operand
TILE_ROWS = 128  # to which each product of a batch is rounded up
# Operators that move no data.
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh"}
UNCERTAINTY = {"few": 0.06, "many": 0.03}  # of a ratio, estimated; the range of cuBLAS's rates comes on top


@dataclass(frozen=True)
class Product:
    """A GEMM of cuBLAS, (m, k) times (k, n)."""

    m: int
    k: int
    n: int

    @property
    def name(self) -> str:
        return f"product {self.m} x {self.k} x {self.n}"

    def microseconds(self, gpu: str, speed: str, c: Constants = CONSTANTS) -> float:
        """Inner dimensions are rounded up to 64; a partly filled last tile of columns costs ``last_columns``."""
        n, k = self.n, -(-self.k // 64) * 64
        factor = 1.0
        if n > 256 and n % 256:
            n, factor = n // 256 * 256, c.last_columns
        rate = c.cublas[speed][k >= n] * (c.cublas_few_tokens if self.m <= c.few_tokens else 1)
        return factor * 2 * self.m * n * k / (1e6 * rate)


@dataclass(frozen=True)
class TorchGelu:
    """``gelu`` or ``gelu_backward`` of PyTorch."""

    name: str
    elements: int
    bytes: int

    def stream_dram(self, gpu: str, c: Constants = CONSTANTS) -> float:
        return self.bytes / (1e6 * c.dram[gpu] * c.stream_dram_reached)

    def microseconds(self, gpu: str, speed: str, c: Constants = CONSTANTS) -> float:
        instructions = self.elements / 32 * c.torch_gelu_instructions[self.name]
        issue = instructions / (c.multiprocessors * RATES["issue"] * 1e3 * c.stream_clock * c.stream_issue_reached)
        return power_sum(c.stream_power, issue, self.stream_dram(gpu))


@dataclass(frozen=True)
class Other:
    """Any other operator of PyTorch."""

    name: str
    bytes: int

    def microseconds(self, gpu: str, speed: str, c: Constants = CONSTANTS) -> float:
        return c.reduction if self.bytes > 1e6 else c.small_operator


Step = Product | TorchGelu | Other | Cost


class _Operators(TorchDispatchMode):
    """Appends to ``steps`` what PyTorch's operators would launch."""

    def __init__(self, steps: list) -> None:
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in FREE):
            self.steps.append(_step(name, [t for t in args if isinstance(t, Tensor)], result))
        return result


def _step(name: str, inputs: list[Tensor], result: Tensor) -> Step:
    moved = sum(t.numel() * t.element_size() for t in (*inputs, result) if isinstance(t, Tensor))
    if name in PRODUCTS:
        *batch, rows, n = result.shape
        if batch:  # no tile spans two products
            rows = prod(batch) * -(-rows // TILE_ROWS) * TILE_ROWS
        return Product(rows, inputs[PRODUCTS[name]].shape[-1], n)
    if name in CONSTANTS.torch_gelu_instructions:
        return TorchGelu(name, result.numel(), moved)
    return Other(name, moved)


def trace(run: Callable[[], object]) -> list[Step]:
    """Every launch of ``run``, whose tensors have no memory, in order."""
    with recording(TARGET) as steps, _Operators(steps):
        run()
    return [cost(step) if isinstance(step, Launch) else step for step in steps]


@dataclass(frozen=True)
class Passes:
    """The steps of a forward and of a backward pass."""

    forward: list[Step]
    backward: list[Step]


def adapted(pool: str, dtype: str, tokens: int, tasks: int, algorithm: str) -> Passes:
    segments = TaskSegments.of((tokens // tasks,) * tasks, torch.device("cpu"))
    ffn = AdaptedFFN(parse_pool(pool), segments, WIDTH, torch.empty(0, dtype=DTYPES[dtype], device="meta"), algorithm)
    return Passes(trace(ffn.forward), trace(ffn.backward))


def frozen(dtype: str, tokens: int) -> Passes:
    """Two GEMMs and a GELU in each direction; frozen weights have no gradients."""
    make: dict[str, Any] = {"dtype": DTYPES[dtype], "device": "meta"}
    x, u = torch.empty(tokens, WIDTH, **make), torch.empty(tokens, 4 * WIDTH, **make)
    down, up = torch.empty(4 * WIDTH, WIDTH, **make), torch.empty(WIDTH, 4 * WIDTH, **make)

    def forward() -> None:
        F.linear(F.gelu(F.linear(x, down)), up)

    def backward() -> None:
        torch.mm(torch.ops.aten.gelu_backward(torch.mm(x, up), u), down)

    return Passes(trace(forward), trace(backward))


def microseconds(steps: list[Step], gpu: str, speed: str = "mid", gelu_at_dram: bool = False) -> float:
    """Time of all steps and their gaps; with ``gelu_at_dram`` launches that only do GELU take their DRAM time."""
    total = 0.0
    for step in steps:
        total += CONSTANTS.gap
        is_gelu = isinstance(step, TorchGelu) or (isinstance(step, Cost) and step.streams and "gelu" in step.name)
        if gelu_at_dram and is_gelu and isinstance(step, TorchGelu | Cost):
            total += step.stream_dram(gpu)
        else:
            total += step.microseconds(gpu, speed)
    return total


def ratio(own: list[Step], base: list[Step], gpu: str, **options: Any) -> float:
    return microseconds(own, gpu, **options) / microseconds(base, gpu, **options)


def ratios(own: Passes, base: Passes, gpu: str, tokens: int) -> dict[str, dict]:
    """For ``forward`` and for ``both`` passes: the ratio, its range over cuBLAS's rates, its estimated uncertainty,
    the ratio with both GELUs at the DRAM bound, and the microseconds of every step without gaps."""
    found: dict[str, dict] = {}
    pairs = {"forward": (own.forward, base.forward), "both": (own.forward + own.backward, base.forward + base.backward)}
    for name, pair in pairs.items():
        by_speed = [ratio(*pair, gpu, speed=speed) for speed in CONSTANTS.cublas]
        values = {
            "ratio": ratio(*pair, gpu),
            "low": min(by_speed),
            "high": max(by_speed),
            "uncertainty": UNCERTAINTY["few" if tokens <= CONSTANTS.few_tokens else "many"],
            "gelu_at_dram": ratio(*pair, gpu, gelu_at_dram=True),
            "microseconds": microseconds(pair[0], gpu),
            "frozen_microseconds": microseconds(pair[1], gpu),
        }
        found[name] = {key: round(value, 4) for key, value in values.items()}
        found[name]["steps"] = [[step.name, round(step.microseconds(gpu, "mid"), 2)] for step in pair[0]]
    return found
