"""Expert MLPs cut into slices, for :func:`kernels.expert_mixture`."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import Experts


class ExpertPool(nn.Module):
    """``sets`` x ``experts`` MLPs E(x) = W2 GELU(W1 x + b1) + b2, each cut along its hidden layer into ``slices``.

    Parameters are those of the uncut MLPs, whatever the number of slices: ``down`` (sets, experts * hidden, width)
    holds every W1, ``up`` (sets, width, experts * hidden) every W2. A slice adds 1/slices of its expert's b2: b2 counts
    once if all slices of an expert have gate 1.
    """

    def __init__(self, width: int, hidden: int, experts: int, slices: int = 1, sets: int = 1) -> None:
        super().__init__()
        self.slices = slices
        self.down = nn.Parameter(torch.empty(sets, experts * hidden, width))
        self.hidden_bias = nn.Parameter(torch.empty(sets, experts * hidden))
        self.up = nn.Parameter(torch.empty(sets, width, experts * hidden))
        self.output_bias = nn.Parameter(torch.empty(sets, experts, width))
        for parameter, fan_in in (
            (self.down, width),
            (self.hidden_bias, width),
            (self.up, hidden),
            (self.output_bias, hidden),
        ):  # as nn.Linear
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    @property
    def experts(self) -> Experts:
        """The slices, in the order of their experts."""
        biases = (self.output_bias / self.slices).repeat_interleave(self.slices, dim=1)
        return Experts(self.down, self.up, self.hidden_bias, biases, "gelu")

    def dense(self, x: Tensor, chosen: int = 0) -> Tensor:
        """The sum of all experts of one set, at gate 1: x (T, width) -> (T, width)."""
        hidden = F.gelu(F.linear(x, self.down[chosen], self.hidden_bias[chosen]))
        return F.linear(hidden, self.up[chosen], self.output_bias[chosen].sum(0))
