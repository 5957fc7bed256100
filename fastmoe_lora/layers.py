"""The two adapted layers: plain LoRA on a linear layer and a LoRA mixture-of-experts beside any module."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmoe_lora.config import MoEConfig
from fastmoe_lora.frozen import FrozenBase
from fastmoe_lora.routing import Routing
from kernels import TaskRows, lora_moe, lora_moe_packed, resolve
from kernels.packed import aligned
from kernels.ranges import span


def _lora(rank: int, shape: tuple[int, int], device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, d_in) kaiming-uniform and B (d_out, rank) zero, so that an adapted layer starts as the frozen one;
    fp32, whatever the type of the frozen weights."""
    d_in, d_out = shape
    a = nn.Parameter(torch.empty(rank, d_in, device=device))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, nn.Parameter(torch.zeros(d_out, rank, device=device))


class LoRALinear(nn.Linear):
    """y = W x + b + B A x, around an existing linear layer whose parameters (and their names) it keeps.

    Where W is frozen, LoRA is r more columns of its product: a pass over y to add a second one would take longer than
    copying x to where A x stands beside it.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        shape = linear.in_features, linear.out_features
        self.lora_A, self.lora_B = _lora(rank, shape, linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        x = x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x
        a, b, weight = (tensor.to(x.dtype) for tensor in (self.lora_A, self.lora_B, self.weight))
        if self.weight.requires_grad:
            return F.linear(x, weight, self.bias) + F.linear(F.linear(x, a), b)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        y = _FurtherColumns.apply(x.flatten(0, -2), weight, bias, a, b)
        return y.view(*x.shape[:-1], -1)


class _FurtherColumns(torch.autograd.Function):
    """y = [x | x A^T] [W | B]^T + b;  [dx_0 | dH] = dy [W | B],  dx = dx_0 + dH A,  dA = dH^T x,  dB = dy^T x A^T."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        inner = x.new_empty(len(x), x.shape[1] + aligned(len(a)))
        inner[:, : x.shape[1]] = x
        inner[:, x.shape[1] :] = F.linear(x, F.pad(a, (0, 0, 0, aligned(len(a)) - len(a))))
        up = torch.cat([weight, F.pad(b, (0, aligned(len(a)) - len(a)))], dim=1)
        ctx.save_for_backward(inner, up, a)
        return F.linear(inner, up, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
        inner, up, a = ctx.saved_tensors
        rank, width = a.shape
        grad = dy @ up
        dh = grad[:, width : width + rank]
        da, db = dh.t() @ inner[:, :width], dy.t() @ inner[:, width : width + rank]
        return grad[:, :width].addmm_(dh, a), None, None, da, db


class LoRAMoE(nn.Module):
    """y = base(x) + sum_e g_e(x) B_e A_e x, with one linear router per task: equation (10) without the residual.

    ``base`` maps (..., d_in) to (..., d_out): a whole FFN, or one linear layer of it. The experts are shared by
    the tasks; ``routing`` says which rows of x are whose. A frozen FFN, or a frozen linear layer wider than its input,
    is fused with its experts where the kernels run: LoRA is then further columns of its products.
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
        self.frozen = FrozenBase(base)
        routing.layers.append(self)

    @property
    def fused(self) -> bool:
        """Whether base and experts are one operation, which needs Triton and a base that is not trained."""
        return bool(self.frozen.linears) and resolve(self.routing.kernel, self.lora_A.device) == "triton"

    def pack_ahead(self) -> None:
        """Copy the parameters to where the fused kernels read them. ``routing.assign`` does it for the next pass; a
        compiled or captured pass relies on that, any other sees to it itself."""
        if self.fused:
            self.frozen.pack_ahead((self.lora_A, self.lora_B, self.routers))

    def forward(self, x: Tensor) -> Tensor:
        run = self._run_fused if self.fused else self._run_beside
        y, gates, mean_probs, rows = run(x)
        self.routing.record(self.layer, gates, mean_probs, rows)
        return y.view(*x.shape[:-1], -1)

    def _run_beside(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, TaskRows]:
        with span("ffn"):
            base = self.base(x)
        tokens = x.to(base.dtype).flatten(0, -2)
        rows = self.routing.rows(len(tokens), x.device)
        # Autocast would send the fp32 logits to half precision; lora_moe casts what may be cast by itself.
        with torch.autocast(x.device.type, enabled=False), span("experts"):
            return *lora_moe(
                tokens,
                base.flatten(0, -2),
                (self.lora_A, self.lora_B),
                self.routers,
                rows,
                self.config.gating,
                self.routing.kernel,
            ), rows

    def _run_fused(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, TaskRows]:
        compiling = torch.compiler.is_compiling()
        packed = self.frozen.packed if compiling else self.frozen.for_pass((self.lora_A, self.lora_B, self.routers))
        if packed is None:
            raise ValueError("the experts' weights are not packed yet: call routing.assign() before a compiled pass")
        tokens = x.to(packed.up.dtype).flatten(0, -2)
        rows = self.routing.rows(len(tokens), x.device)
        lora = self.lora_A, self.lora_B
        with torch.autocast(x.device.type, enabled=False):
            return *lora_moe_packed(tokens, packed, lora, self.routers, rows, self.config.gating), rows

    def extra_repr(self) -> str:
        return f"{self.config}, gating={self.config.gating_name}, tasks={self.routing.tasks}"
