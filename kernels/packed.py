"""Frozen weights and adapters packed side by side, so that LoRA is a few more columns of the frozen GEMM."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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

    ``parts`` (2, tasks, C, d) holds high and low; for fp32 it is (1, tasks, C, d), the routers themselves. ``scales``
    (tasks,) fp32 are powers of two, with which fp16 keeps small values; 1 for the other types.
    """

    parts: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "SplitRouters":
        """For routers of ``shape`` (tasks, C, d)."""
        parts = torch.empty(1 if dtype == torch.float32 else 2, *shape, dtype=dtype, device=device)
        return cls(parts, torch.ones(shape[0], dtype=torch.float32, device=device))

    @classmethod
    def of(cls, routers: Tensor, dtype: torch.dtype) -> "SplitRouters":
        split = cls.empty(routers.shape, dtype, routers.device)
        split.fill(routers)
        return split

    @torch.no_grad()
    def fill(self, routers: Tensor) -> None:
        """Split ``routers`` (tasks, C, d)."""
        exact = routers.float()
        if self.parts.dtype == torch.float16:
            largest = torch.linalg.vector_norm(exact, torch.inf, dim=(1, 2))
            exponent = torch.frexp(largest).exponent.clamp(-100, 100)
            torch.ldexp(torch.ones_like(self.scales), exponent, out=self.scales)
            exact = exact / self.scales[:, None, None]
        self.parts[0].copy_(exact)
        if len(self.parts) == 2:
            torch.sub(exact, self.parts[0], out=self.parts[1])


@dataclass(frozen=True, eq=False)
class Packed:
    """The weights of one adapted FFN, or of one adapted linear layer, side by side in their compute type.

                an FFN                                                 a linear layer
    up          [W2 | B]               (D, F + R)                      [W | B]    (D, d + R)
    down        [W1 ; A ; W_tasks]     (F + R + tasks C, d)            A          (R, d)
    bias_up     b2                     (D,)                            b          (D,)
    bias_down   b1                     (F,)                            empty      (0,)
    routers     as route_shrink reads them; without a row for plain LoRA

    R in ``up`` and ``down``, and tasks C, are rounded up to multiples of 8 with zeros. ``down`` of a stacked FFN is
    [W1 ; A ; W_task] (tasks, F + R + C, d), a copy of W1 and A for each task: the gradient of the logits then has C
    columns instead of tasks C, also rounded up. For ViT-B and five tasks that is 24 MB a layer in half precision.
    """

    up: Tensor
    down: Tensor
    bias_up: Tensor
    bias_down: Tensor
    routers: SplitRouters
    ranks: int = 0  # R, known where adapters are copied

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], adapters: tuple[Tensor, ...], dtype: torch.dtype, stacked: bool = False
    ) -> "Packed":
        """Zeros for an FFN of widths (d, F, D), or a linear layer of widths (d, D). An FFN is ``stacked`` where that
        makes the columns of the logits' gradient fewer.

        ``adapters`` is (A, B, routers), or (A, B) for a linear layer with plain LoRA.
        """
        (d, *between, width), a = shape, adapters[0]
        make: dict[str, Any] = {"dtype": dtype, "device": a.device}
        hidden, ranks = sum(between), aligned(len(a))
        tasks, columns = adapters[2].shape[:2] if hidden else (1, 0)
        copies, together = ((tasks,), 1) if stacked and aligned(columns) < tasks * columns else ((), tasks)
        up = torch.zeros(width, shape[-2] + ranks, **make)
        down = torch.zeros(*copies, hidden + ranks + aligned(together * columns), d, **make)
        split = SplitRouters.empty(adapters[2].shape if len(adapters) > 2 else (0, 0, d), dtype, a.device)
        return cls(up, down, torch.zeros(width, **make), torch.zeros(hidden, **make), split, len(a))

    @classmethod
    def of(cls, *tensors: Tensor) -> "Packed":
        """The inverse of :attr:`tensors`."""
        up, down, bias_up, bias_down, parts, scales = tensors
        return cls(up, down, bias_up, bias_down, SplitRouters(parts, scales))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.up, self.down, self.bias_up, self.bias_down, self.routers.parts, self.routers.scales

    @property
    def hidden(self) -> int:
        """F; 0 for a linear layer."""
        return self.bias_down.shape[0]  # len() of a tensor goes through Python

    @property
    def inner(self) -> int:
        """The columns of ``up`` before B: F, or d for a linear layer."""
        return self.hidden or self.down.shape[-1]

    @property
    def stacked(self) -> bool:
        return self.down.ndim == 3

    @property
    def first_down(self) -> Tensor:
        """(rows, d), which begin with [W1 ; A]."""
        return self.down[0] if self.stacked else self.down

    @property
    def padded_ranks(self) -> int:
        """R rounded up to a multiple of 8."""
        return self.up.shape[1] - self.inner

    @torch.no_grad()
    def fill_frozen(self, *linears: Linear) -> None:
        """Copy fc1 and fc2, or the linear layer."""
        targets = (self.down[..., : self.hidden, :], self.bias_down), (self.up[:, : self.inner], self.bias_up)
        for (weight, bias), (weight_target, bias_target) in zip(linears, targets[-len(linears) :], strict=True):
            weight_target.copy_(weight)
            if bias is not None:
                bias_target.copy_(bias)

    @cached_property
    def targets(self) -> tuple[tuple[Tensor, int], ...]:
        """Where A, B and, of an FFN, the routers are copied, each with its place among the adapters. Every copy of A is
        a target."""
        downs = self.down.unbind() if self.stacked else (self.down,)
        both = [(down[self.hidden :][: self.ranks], 0) for down in downs]
        both.append((self.up[:, self.inner : self.inner + self.ranks], 1))
        if not self.hidden:
            return tuple(both)
        _, tasks, columns, d = self.routers.parts.shape
        rows = self.down[..., self.hidden + self.padded_ranks :, :]
        routers = rows[:, :columns] if self.stacked else rows[: tasks * columns].view(tasks, columns, d)
        return *both, (routers, 2)

    def fill(self, a: Tensor, b: Tensor, *routers: Tensor) -> None:
        """Copy the adapters; needed once after each of their updates."""
        fill_all([self], [(a, b, *routers)])


@torch.no_grad()
def fill_all(layers: Sequence[Packed], adapters: Sequence[tuple[Tensor, ...]]) -> None:
    """Copy the adapters of many layers, (A, B) or (A, B, routers) each, in a few calls."""
    copies = [
        (target, given[place]) for layer, given in zip(layers, adapters, strict=True) for target, place in layer.targets
    ]
    for dense in (True, False):  # one strided tensor would keep all others from being copied by one launch
        pairs = [pair for pair in copies if pair[0].is_contiguous() == dense]
        if pairs:
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
    splits = [(layer.routers, given[2]) for layer, given in zip(layers, adapters, strict=True) if len(given) > 2]
    if any(split.parts.dtype == torch.float16 for split, _ in splits):  # each with a scale
        for split, routers in splits:
            split.fill(routers)
        return
    if splits:
        high, exact = [split.parts[0] for split, _ in splits], [routers for _, routers in splits]
        torch._foreach_copy_(high, exact)
        if len(splits[0][0].parts) == 2:
            torch._foreach_copy_([split.parts[1] for split, _ in splits], torch._foreach_sub(exact, high))
