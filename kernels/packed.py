"""Frozen weights and adapters packed side by side, so that LoRA is a few more columns of the frozen GEMM."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Linear = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out,)


def aligned(columns: int) -> int:
    """``columns`` rounded up to a multiple of 8: rows then begin at multiples of 16 bytes, as fast GEMMs need."""
    return -(-columns // 8) * 8


def columns_pay(d: int, width: int) -> bool:
    """True if widening the GEMM of a linear layer d -> width is cheaper than adding LoRA to its output.

    Widening copies x (2 T d elements); a separate add reads and writes y (2 T D): fc1 yes, fc2 no.
    """
    return width > d


@dataclass(frozen=True, eq=False)
class SplitRouters:
    """fp32 routers as sums of numbers in the tokens' type, exact to 2^-17: W_task = scale (high + low).

    ``parts`` (tasks, 2, C, d) holds high and low; for fp32 it is (tasks, 1, C, d), the routers themselves. ``scales``
    (tasks,) fp32 are powers of two, with which fp16 keeps small values; 1 for the other types.
    """

    parts: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "SplitRouters":
        """For routers of ``shape`` (tasks, C, d)."""
        tasks, columns, d = shape
        parts = torch.empty(tasks, 1 if dtype == torch.float32 else 2, columns, d, dtype=dtype, device=device)
        return cls(parts, torch.ones(tasks, dtype=torch.float32, device=device))

    @classmethod
    def of(cls, routers: Tensor, dtype: torch.dtype) -> "SplitRouters":
        split = cls.empty(routers.shape, dtype, routers.device)
        split.fill(routers)
        return split

    @torch.no_grad()
    def fill(self, routers: Tensor) -> None:
        """Split ``routers`` (tasks, C, d)."""
        exact, high = routers.float(), self.parts[:, 0]
        if self.parts.dtype == torch.float16:
            largest = torch.linalg.vector_norm(exact, torch.inf, dim=(1, 2))
            exponent = torch.frexp(largest).exponent.clamp(-100, 100)
            torch.ldexp(torch.ones_like(self.scales), exponent, out=self.scales)
            exact = exact / self.scales[:, None, None]
        high.copy_(exact)
        if self.parts.shape[1] == 2:
            torch.sub(exact, high, out=self.parts[:, 1])


@dataclass(frozen=True, eq=False)
class Packed:
    """The weights of one adapted FFN, or of one adapted linear layer, side by side in their compute type.

                an FFN                                                 a linear layer
    up          [W2 | B]               (D, F + R)                      [W | B]    (D, d + R)
    down        [W1 ; A ; W_tasks]     (F + R + tasks C, d)            A          (R, d)
    bias_up     b2                     (D,)                            b          (D,)
    bias_down   b1                     (F,)                            empty      (0,)
    routers     as route_shrink reads them; without a row for plain LoRA

    R in ``up`` and ``down``, and tasks C, are rounded up to multiples of 8 with zeros.
    """

    up: Tensor
    down: Tensor
    bias_up: Tensor
    bias_down: Tensor
    routers: SplitRouters

    @classmethod
    def empty(cls, shape: tuple[int, ...], adapters: tuple[Tensor, ...], dtype: torch.dtype) -> "Packed":
        """Zeros for an FFN of widths (d, F, D) or a linear layer of widths (d, D).

        ``adapters`` is (A, B, routers), or (A, B) for a linear layer with plain LoRA.
        """
        (d, *between, width), a = shape, adapters[0]
        make: dict[str, Any] = {"dtype": dtype, "device": a.device}
        hidden, ranks = sum(between), aligned(len(a))
        columns = aligned(adapters[2].shape[0] * adapters[2].shape[1]) if hidden else 0
        up, down = torch.zeros(width, shape[-2] + ranks, **make), torch.zeros(hidden + ranks + columns, d, **make)
        split = SplitRouters.empty(adapters[2].shape if len(adapters) > 2 else (0, 0, d), dtype, a.device)
        return cls(up, down, torch.zeros(width, **make), torch.zeros(hidden, **make), split)

    @classmethod
    def of(cls, *tensors: Tensor) -> "Packed":
        """The inverse of :attr:`tensors`."""
        return cls(*tensors[:4], SplitRouters(*tensors[4:]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.up, self.down, self.bias_up, self.bias_down, self.routers.parts, self.routers.scales

    @property
    def hidden(self) -> int:
        """F; 0 for a linear layer."""
        return len(self.bias_down)

    @property
    def inner(self) -> int:
        """The columns of ``up`` before B: F, or d for a linear layer."""
        return self.hidden or self.down.shape[1]

    @property
    def padded_ranks(self) -> int:
        """R rounded up to a multiple of 8."""
        return self.up.shape[1] - self.inner

    @torch.no_grad()
    def fill_frozen(self, *linears: Linear) -> None:
        """Copy fc1 and fc2, or the linear layer."""
        targets = (self.down[: self.hidden], self.bias_down), (self.up[:, : self.inner], self.bias_up)
        for (weight, bias), (weight_target, bias_target) in zip(linears, targets[-len(linears) :], strict=True):
            weight_target.copy_(weight)
            if bias is not None:
                bias_target.copy_(bias)

    @torch.no_grad()
    def fill(self, a: Tensor, b: Tensor, *routers: Tensor) -> None:
        """Copy the adapters; needed once after each of their updates."""
        self.up[:, self.inner : self.inner + b.shape[1]].copy_(b)
        self.down[self.hidden : self.hidden + len(a)].copy_(a)
        if routers:
            self.routers.fill(routers[0])
        if self.hidden:
            stacked = routers[0].flatten(0, 1)
            self.down[self.hidden + self.padded_ranks :][: len(stacked)].copy_(stacked)
