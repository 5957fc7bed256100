"""lora_moe as an autograd function over the kernels, alone or fused with the frozen layer beside it.

                        one pass                                                     saved beside parameters
    beside any module   pack, route_shrink, expand                                   x, H (T, R), z (T, C) fp32
                        pack, GEMM, gate_backward, 2 weight_grad, reduce, GEMM
    a linear layer      pack, route_shrink, a copy of x, GEMM                        the same
                        as above
    an FFN              pack, route_shrink, GEMM, gelu, GEMM                         the same and u (T, F)
                        pack, GEMM, gelu_backward, gate_backward, ..

LoRA is a few more columns of the frozen GEMMs:

    y = [act | H'] [W2 | B]^T + b2          act = gelu(x W1^T + b1), or x for one linear layer
    [da | dH'] = dY [W2 | B]
    dx = [du | dH | dz] [W1 ; A ; W_tasks]  dz has C columns per task, zero but for the token's own

Algorithms of an FFN, which kernels/tables.json chooses by measurement (bench.tune):

    columns     the GEMMs are cuBLAS's
    fused       our GEMMs compute u and [da | dH'], with GELU in their epilogue

The wide matrices are made in each pass (:mod:`kernels.pack`); only parameters are saved, never the output of an expert.
Backward does not write to its inputs, so it may run twice. A compiled pass calls both directions as custom operators,
an eager one as functions: torch.library's dispatch costs the host about as much as the launches.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from triton import knobs

from kernels import nvtx
from kernels.errors import UserError
from kernels.expand import expand
from kernels.gate_backward import gate_backward
from kernels.gating import Gating, Pool, make_pool
from kernels.gelu import gelu
from kernels.matmul_gelu import matmul_gelu, matmul_gelu_backward
from kernels.pack import pack_backward, pack_forward
from kernels.reference import Linear
from kernels.route_shrink import route_shrink
from kernels.segments import TaskSegments
from kernels.tiles import LARGE, ffn_algorithm
from kernels.vmap import is_batched, looped
from kernels.weight_grad import empty_parts, reduce, weight_grad

ALGORITHMS = ("columns", "fused")
DETERMINISTIC = "deterministic"  # the table's algorithm, the same for every number of tokens


def check_type(dtype: torch.dtype) -> None:
    """UserError if the kernels do not compute in this type."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"--kernel=triton computes in fp32, fp16 or bf16, not in {dtype}; use --kernel=reference")
    if dtype == torch.bfloat16 and knobs.runtime.interpret:
        raise UserError("Triton's interpreter multiplies bf16 wrongly: use fp32 or fp16 with it, or a GPU")


@cache
def _parse(
    setting: str, ranks: int, columns: int, device: torch.device, dtype: torch.dtype, large: bool
) -> tuple[Pool, str]:
    """The pool, and the algorithm of an FFN over at least LARGE tokens or fewer."""
    check_type(dtype)
    gating, _, algorithm = setting.rpartition("/")
    if algorithm not in ALGORITHMS:
        algorithm = ffn_algorithm(device, large or algorithm == DETERMINISTIC)
    return make_pool(ranks, columns, gating), algorithm


def forward(
    x: Tensor, base: Tensor | None, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    a: Tensor, b: Tensor, routers: Tensor, offsets: Tensor, length: int, setting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, g, P, H, z, u). ``base`` beside any module; (w2, b2) for a linear layer; (w1, b1, w2, b2) for an FFN.
    ``setting`` is gating and algorithm as one text."""
    segments = TaskSegments(offsets, len(routers), None, length)
    pool, algorithm = _parse(setting, len(a), routers.shape[1], x.device, x.dtype, len(x) >= LARGE)
    x, dtype, u = x.contiguous(), x.dtype, x.new_empty(len(x), 0)
    with torch.cuda.device_of(x):
        up, down, parts, scales = pack_forward(w2, (a, b, routers), dtype)
        hidden = 0 if w2 is None else w2.shape[1]
        inner = x.new_empty(len(x), up.shape[1])
        act, gated = inner[:, :hidden], inner[:, hidden:]
        with nvtx.span("route"):
            h, z, g, p = route_shrink(x, down, (parts, scales), gated, segments, pool)
        with nvtx.span("ffn"):
            if base is not None:
                return expand(base.contiguous(), gated, up, pool), g, p, h, z, u
            if w1 is None:
                act.copy_(x)
            elif algorithm == "fused":
                bias = x.new_zeros(hidden) if b1 is None else b1.to(dtype)
                u = matmul_gelu(x, w1.to(dtype), bias, act, pool)
            else:
                u = F.linear(x, w1.to(dtype), None if b1 is None else b1.to(dtype))
                gelu(u, act)
            return F.linear(inner, up, None if b2 is None else b2.to(dtype)), g, p, h, z, u


def backward(
    dy: Tensor, dp: Tensor, x: Tensor, h: Tensor, z: Tensor, u: Tensor, w1: Tensor | None, w2: Tensor | None,
    a: Tensor, b: Tensor, routers: Tensor, offsets: Tensor, length: int, setting: str, needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dA, dB, dW), the last three in the types of their parameters; dx is empty unless it is needed."""
    segments = TaskSegments(offsets, len(routers), None, length)
    pool, algorithm = _parse(setting, len(a), routers.shape[1], x.device, x.dtype, len(x) >= LARGE)
    dy, x, dp = dy.contiguous(), x.contiguous(), dp.contiguous()
    if not needs_dx:  # dH' = dY B alone
        w1 = w2 = None
    with torch.cuda.device_of(x):
        up, down = pack_backward((w1, w2), (a, b, routers), x.dtype)
        hidden, width = 0 if w2 is None else w2.shape[1], up.shape[1]
        # [du | dH | dz], one column for each row of down; the gradient of a linear layer's input stands before them.
        grad = x.new_empty(len(x), len(down) + (hidden if w1 is None else 0))
        if w1 is not None and algorithm == "fused":
            matmul_gelu_backward(dy, up, u, grad[:, :width], pool)
        else:
            torch.mm(dy, up, out=grad[:, :width])
            if w1 is not None:
                gelu(u, grad[:, :hidden], backward=True)
        del up  # its memory serves for the partial sums
        dz, gated = gate_backward(grad[:, hidden:], width - hidden, (h, z), dp, segments, pool)
        dh = grad[:, hidden : hidden + pool.ranks]
        parts = empty_parts(dy, x, dh, segments, pool)
        weight_grad(dy, gated, None, parts, segments, pool)
        weight_grad(x, dh, dz, parts, segments, pool)
        da, db, drouters = reduce(parts, segments)
        if not needs_dx:
            dx = x.new_empty(0)
        elif w1 is None and w2 is not None:
            dx = torch.addmm(grad[:, :hidden], grad[:, hidden:], down)
        else:
            dx = torch.mm(grad, down)
    return dx, da.to(a.dtype), db.to(b.dtype), drouters.to(routers.dtype)


forward_op = torch.library.custom_op("fastmoe_lora::lora_moe", forward, mutates_args=())
backward_op = torch.library.custom_op("fastmoe_lora::lora_moe_backward", backward, mutates_args=())


@forward_op.register_fake
def _(x, base, w1, b1, w2, b2, a, b, routers, offsets, length, setting):
    # Not from the cache: sizes may be symbolic.
    pool, rows = make_pool.__wrapped__(a.shape[0], routers.shape[1], setting.rpartition("/")[0]), x.shape[0]
    shapes = (rows, pool.experts), (len(routers), pool.columns), (rows, pool.columns)
    g, p, z = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    widths = b.shape[0], a.shape[0], 0 if w1 is None else w1.shape[0]
    y, h, u = (x.new_empty(rows, width) for width in widths)
    return y, g, p, h, z, u


@backward_op.register_fake
def _(dy, dp, x, h, z, u, w1, w2, a, b, routers, offsets, length, setting, needs_dx):
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return dx, *(parameter.new_empty(parameter.shape) for parameter in (a, b, routers))


backward_op.register_vmap(looped(backward_op))


class _LoRAMoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base, w1, b1, w2, b2, a, b, routers, offsets, length, setting):
        run = forward_op if torch.compiler.is_compiling() else forward
        y, g, p, h, z, u = run(x, base, w1, b1, w2, b2, a, b, routers, offsets, length, setting)
        ctx.static = length, setting
        ctx.set_materialize_grads(False)  # g has no gradient; zeros for it would be a pass
        ctx.save_for_backward(x, h, z, u, w1, w2, a, b, routers, offsets)
        ctx.mark_non_differentiable(g)
        return y, g, p

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dg, dp):
        x, h, z, u, w1, w2, a, b, routers, offsets = ctx.saved_tensors  # asked for once, as checkpointing requires
        needed = ctx.needs_input_grad
        dp = z.new_zeros(routers.shape[:2]) if dp is None else dp
        dy = x.new_zeros(x.shape[0], b.shape[0]) if dy is None else dy
        rest = x, h, z, u, w1, w2, a, b, routers, offsets, *ctx.static, needed[0]
        as_op = torch.compiler.is_compiling() or is_batched(dy) or is_batched(dp)
        dx, da, db, drouters = (backward_op if as_op else backward)(dy, dp, *rest)
        return (dx if needed[0] else None, dy if needed[1] else None, *[None] * 4, da, db, drouters, None, None, None)


def lora_moe(
    x: Tensor,
    base: Tensor | tuple[Linear, ...],
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    segments: TaskSegments,
    gating: Gating,
    deterministic: bool = False,
    algorithm: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kernels.reference.lora_moe`, in fp32, fp16 or bf16; g is for statistics and has no gradient.

    ``base`` is a tensor, or the frozen layer whose output it is: (W, b) of a linear layer, or of the two of an FFN.
    ``algorithm`` is one of ALGORITHMS; by default the table's for this number of tokens, with ``deterministic`` the
    same for every number.
    """
    algorithm = algorithm or (DETERMINISTIC if deterministic else "")
    if isinstance(base, Tensor):
        frozen: tuple[Any, ...] = base, None, None, None, None
    else:
        frozen = None, *((None, None) if len(base) == 1 else base[0]), *base[-1]
    arguments = (x, *frozen, *lora, routers, segments.offsets, segments.length, f"{gating.text}/{algorithm}")
    run = _LoRAMoE.apply if torch.compiler.is_compiling() or torch.is_grad_enabled() else forward
    return run(*arguments)[:3]
