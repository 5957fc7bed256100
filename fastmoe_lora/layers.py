"""The two adapted layers: plain LoRA on a linear layer, and a LoRA mixture-of-experts beside any module."""

import math

import torch
from torch import Tensor, nn

from fastmoe_lora.config import MoEConfig
from fastmoe_lora.packing import PackedLayer, Parts, fusible, weights_of
from fastmoe_lora.routing import Routing
from kernels import TaskSegments, lora_moe, lora_moe_packed, resolve_kernel
from kernels.lora_linear import lora_linear, lora_linear_reference
from kernels.nvtx import span
from kernels.pool import fits_one_tile


def _lora(rank: int, shape: tuple[int, int], device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, d_in) kaiming-uniform and B (d_out, rank) zero, so that an adapted layer starts as the frozen one.

    Both are fp32, whatever the type of the frozen weights.
    """
    d_in, d_out = shape
    a = nn.Parameter(torch.empty(rank, d_in, device=device))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, nn.Parameter(torch.zeros(d_out, rank, device=device))


class LoRALinear(nn.Linear):
    """y = W x + b + B A x on x (.., d_in), around an existing linear layer whose parameters (and names) it keeps.

    With W and b frozen, :func:`kernels.lora_linear.lora_linear` computes y from packed copies of the weights, in their
    type or autocast's (see :mod:`fastmoe_lora.packing`). With W or b trained, y is the sum of two products.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        shape = linear.in_features, linear.out_features
        self.lora_A, self.lora_B = _lora(rank, shape, linear.weight.device)
        self.packing = PackedLayer()

    def plain(self) -> nn.Linear:
        """A linear layer with these parameters and without LoRA."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @property
    def frozen(self) -> bool:
        return not (self.weight.requires_grad or self.bias is not None and self.bias.requires_grad)

    @property
    def parts(self) -> Parts | None:
        """What is packed; None if the layer runs from its own parameters."""
        return ((self,), (self.lora_A, self.lora_B)) if self.frozen else None

    def forward(self, x: Tensor) -> Tensor:
        lora = self.lora_A, self.lora_B
        if not self.frozen:
            return lora_linear_reference(x, (self.weight, self.bias), lora)
        packed = self.packing.for_pass((self,), lora)
        tokens = x.to(packed.up.dtype).flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(tokens, packed, lora).view(*x.shape[:-1], -1)


class LoRAMoE(nn.Module):
    """y = base(x) + sum_e g_e(x) B_e A_e x, with one linear router per task: equation (10) without the residual.

    ``base`` maps (.., d_in) to (.., d_out): a whole FFN, or one linear layer of it. The tasks share the experts;
    ``routing`` says which rows of x belong to which task. Base and experts are one fused operation if the base is
    frozen, the Triton kernels run, :func:`fastmoe_lora.packing.fusible` accepts the base, no token is padding, and the
    pool fits one register tile. Else the base runs first and the experts beside it. For a padding token y = base(x).
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
        self.one_tile = fits_one_tile(config.experts, config.rank)
        self.packing = PackedLayer()

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """The base's linear layers for the fused kernels; empty if they cannot compute the base, the gradients of its
        weights or so large a pool."""
        linears = fusible(self.base) if self.one_tile else ()
        return () if any(tensor.requires_grad for tensor in weights_of(linears)) else linears

    @property
    def runs_triton(self) -> bool:
        """Whether the routing's kernel is Triton's where the experts are."""
        return resolve_kernel(self.routing.kernel, self.lora_A.device) == "triton"

    @property
    def fused(self) -> bool:
        """Whether base and experts are one operation."""
        return self.parts is not None

    @property
    def adapters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A, self.lora_B, self.routers

    @property
    def parts(self) -> Parts | None:
        """What is packed; None if base and experts are not one operation."""
        # The kernel first: packing asks for this before a compiled pass, which then finds the kernel resolved.
        linears = self.linears if self.runs_triton else ()
        return (linears, self.adapters) if linears else None

    def forward(self, x: Tensor) -> Tensor:
        linears = self.linears if self.routing.real is None and self.runs_triton else ()
        y, gates, mean_probs, segments = self._run_fused(x, linears) if linears else self._run_beside(x)
        self.routing.record(self.layer, gates, mean_probs, segments)
        return y.view(*x.shape[:-1], -1)

    def _run_beside(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, TaskSegments]:
        with span("ffn"):
            base = self.base(x)
        tokens, base, real = x.to(base.dtype).flatten(0, -2), base.flatten(0, -2), self.routing.real
        segments = self.routing.segments(len(tokens), x.device)
        gating, kernel, lora = self.config.gating, self.routing.kernel, (self.lora_A, self.lora_B)
        # Autocast would compute the fp32 logits in half precision; lora_moe casts A and B itself.
        with torch.autocast(x.device.type, enabled=False), span("experts"):
            if real is None:
                return *lora_moe(tokens, base, lora, self.routers, segments, gating, kernel), segments
            real = real.to(x.device)
            y, *rest = lora_moe(tokens[real], base[real], lora, self.routers, segments, gating, kernel)
            return base.index_copy(0, real, y), *rest, segments

    def _run_fused(self, x: Tensor, linears: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor, Tensor, TaskSegments]:
        packed = self.packing.for_pass(linears, self.adapters)
        tokens = x.to(packed.up.dtype).flatten(0, -2)
        segments = self.routing.segments(len(tokens), x.device)
        lora, gating, deterministic = (self.lora_A, self.lora_B), self.config.gating, self.routing.deterministic
        with torch.autocast(x.device.type, enabled=False):
            return *lora_moe_packed(tokens, packed, lora, self.routers, segments, gating, deterministic), segments

    def extra_repr(self) -> str:
        return f"{self.config}, gating={self.config.gating_name}, tasks={self.routing.tasks}"
