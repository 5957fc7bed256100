"""The two adapted layers: plain LoRA on a linear layer and a LoRA mixture-of-experts beside any module."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmoe_lora.config import MoEConfig
from fastmoe_lora.routing import Routing
from kernels import lora_moe


def _lora(rank: int, shape: tuple[int, int], device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, d_in) kaiming-uniform and B (d_out, rank) zero, so that an adapted layer starts as the frozen one;
    fp32, whatever the type of the frozen weights."""
    d_in, d_out = shape
    a = nn.Parameter(torch.empty(rank, d_in, device=device))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, nn.Parameter(torch.zeros(d_out, rank, device=device))


class LoRALinear(nn.Linear):
    """y = W x + b + B A x, around an existing linear layer whose parameters (and their names) it keeps."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        shape = linear.in_features, linear.out_features
        self.lora_A, self.lora_B = _lora(rank, shape, linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


class LoRAMoE(nn.Module):
    """y = base(x) + sum_e g_e(x) B_e A_e x, with one linear router per task: equation (10) without the residual.

    ``base`` maps (..., d_in) to (..., d_out): a whole FFN, or one linear layer of it. The experts are shared by
    the tasks; ``routing`` says which rows of x are whose.
    """

    def __init__(
        self, base: nn.Module, shape: tuple[int, int], config: MoEConfig, routing: Routing, layer: int
    ) -> None:
        super().__init__()
        self.base, self.config, self.routing, self.layer = base, config, routing, layer
        device = next(base.parameters()).device
        columns = config.gating.router_columns(config.experts)
        self.routers = nn.Parameter(torch.empty(routing.tasks, columns, shape[0], device=device).normal_(std=0.01))
        self.lora_A, self.lora_B = _lora(config.experts * config.rank, shape, device)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        tokens = x.to(base.dtype).flatten(0, -2)
        rows = self.routing.rows(len(tokens), x.device)
        # Autocast would send the fp32 logits to half precision; lora_moe casts what may be cast by itself.
        with torch.autocast(x.device.type, enabled=False):
            y, gates, mean_probs = lora_moe(
                tokens, base.flatten(0, -2), (self.lora_A, self.lora_B), self.routers, rows, self.config.gating,
                self.routing.kernel,
            )
        self.routing.record(self.layer, gates, mean_probs, rows)
        return y.view_as(base)

    def extra_repr(self) -> str:
        return f"{self.config}, gating={self.config.gating_name}, tasks={self.routing.tasks}"
