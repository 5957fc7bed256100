"""The weights of an adapted frozen base side by side, so that LoRA is a few more columns of the frozen products."""

from dataclasses import dataclass

import torch
from torch import Tensor

Linear = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out,)


def aligned(columns: int) -> int:
    """Rows of a matrix begin at multiples of 16 bytes, as fast products want them."""
    return -(-columns // 8) * 8


def columns_pay(d: int, width: int) -> bool:
    """Whether LoRA beside one linear layer, d -> width, comes cheaper as further columns of its product, for which x
    is copied (T 2 d es bytes), than as a pass over y (T 2 D es): in fc1, that is, and not in fc2."""
    return width > d


@dataclass(frozen=True, eq=False)
class Packed:
    """The weights of one adapted FFN, or of one adapted linear layer, side by side in the type they compute in.

                an FFN                                                 a linear layer
    up          [W2 | B]               (D, F + R)                      [W | B]    (D, d + R)
    down        [W1 ; A ; W_tasks]     (F + R + tasks C, d)            A          (R, d)
    bias_up     b2                     (D,)                            b          (D,)
    bias_down   b1                     (F,)                            nothing    (0,)

    The R of ``up`` and ``down``, and tasks C, are rounded up to multiples of 8 with zeros.
    """

    up: Tensor
    down: Tensor
    bias_up: Tensor
    bias_down: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], adapters: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> "Packed":
        """For an FFN of widths (d, F, D) or a linear layer of widths (d, D), and the adapters (A, B, routers)."""
        (d, *between, width), (a, _, routers) = shape, adapters
        hidden, ranks, make = sum(between), aligned(len(a)), {"dtype": dtype, "device": a.device}
        columns = aligned(routers.shape[0] * routers.shape[1]) if hidden else 0
        up, down = torch.zeros(width, shape[-2] + ranks, **make), torch.zeros(hidden + ranks + columns, d, **make)
        return cls(up, down, torch.zeros(width, **make), torch.zeros(hidden, **make))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.up, self.down, self.bias_up, self.bias_down

    @property
    def hidden(self) -> int:
        """F, or 0 of a linear layer."""
        return len(self.bias_down)

    @property
    def inner(self) -> int:
        """The columns of ``up`` before B: F, or d of a linear layer."""
        return self.hidden or self.down.shape[1]

    @property
    def held(self) -> int:
        """R, rounded up."""
        return self.up.shape[1] - self.inner

    @torch.no_grad()
    def fill_frozen(self, *linears: Linear) -> None:
        """Copies fc1 and fc2, or the linear layer."""
        places = (self.down[: self.hidden], self.bias_down), (self.up[:, : self.inner], self.bias_up)
        for (weight, bias), (weight_place, bias_place) in zip(linears, places[-len(linears) :], strict=True):
            weight_place.copy_(weight)
            if bias is not None:
                bias_place.copy_(bias)

    @torch.no_grad()
    def fill(self, a: Tensor, b: Tensor, routers: Tensor) -> None:
        """Copies the adapters, once after each of their updates."""
        self.up[:, self.inner : self.inner + b.shape[1]].copy_(b)
        self.down[self.hidden : self.hidden + len(a)].copy_(a)
        if self.hidden:
            first = self.hidden + self.held
            self.down[first : first + routers.shape[0] * routers.shape[1]].copy_(routers.flatten(0, 1))
