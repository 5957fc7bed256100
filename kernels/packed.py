"""The weights of an adapted FFN side by side, so that LoRA is a few more columns of the frozen products."""

from dataclasses import dataclass

import torch
from torch import Tensor

Linear = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out,)


def aligned(columns: int) -> int:
    """Rows of a matrix begin at multiples of 16 bytes, as fast products want them."""
    return -(-columns // 8) * 8


@dataclass(frozen=True, eq=False)
class Packed:
    """The weights of one adapted FFN side by side in the type they compute in; ``bias_down`` is b1, ``bias_up`` b2.

    up (D, F + R)            [W2 | B]
    down (F + R + tasks C, d)  [W1 ; A ; W_tasks], R and tasks C rounded up to multiples of 8 with zeros
    """

    up: Tensor
    down: Tensor
    bias_up: Tensor  # (D,)
    bias_down: Tensor  # (F,)

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], adapters: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
    ) -> "Packed":
        """For an FFN of widths (d, F, D) and the adapters (A, B, routers)."""
        (d, hidden, width), (a, _, routers) = shape, adapters
        ranks, columns = aligned(len(a)), aligned(routers.shape[0] * routers.shape[1])
        make = {"dtype": dtype, "device": a.device}
        up, down = torch.zeros(width, hidden + ranks, **make), torch.zeros(hidden + ranks + columns, d, **make)
        return cls(up, down, torch.zeros(width, **make), torch.zeros(hidden, **make))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.up, self.down, self.bias_up, self.bias_down

    @property
    def hidden(self) -> int:
        """F."""
        return len(self.bias_down)

    @property
    def held(self) -> int:
        """R, rounded up."""
        return self.up.shape[1] - self.hidden

    @torch.no_grad()
    def fill_frozen(self, down: Linear, up: Linear) -> None:
        """Copies fc1 and fc2."""
        self.down[: self.hidden].copy_(down[0])
        self.up[:, : self.hidden].copy_(up[0])
        for target, bias in ((self.bias_down, down[1]), (self.bias_up, up[1])):
            if bias is not None:
                target.copy_(bias)

    @torch.no_grad()
    def fill(self, a: Tensor, b: Tensor, routers: Tensor) -> None:
        """Copies the adapters, once after each of their updates."""
        self.up[:, self.hidden : self.hidden + b.shape[1]].copy_(b)
        self.down[self.hidden : self.hidden + len(a)].copy_(a)
        first = self.hidden + self.held
        self.down[first : first + routers.shape[0] * routers.shape[1]].copy_(routers.flatten(0, 1))
