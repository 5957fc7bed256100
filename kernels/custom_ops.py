"""PyTorch custom operators over the kernels, with their fake versions and their autograd.

    lora_moe            forward     route_shrink, expand
                        backward    gate_backward, weight_grad of dB, weight_grad of dA and dW, reduce, expand
                        saved       x, H (T, R) in x's type and z (T, C) fp32
    lora_moe_packed     forward     route_shrink, gelu, two GEMMs
    of an FFN           backward    a GEMM, gelu, gate_backward, the same weight_grads, a GEMM
                        saved       the same and u (T, F)
    of a linear layer   forward     route_shrink, a copy of x, a GEMM
                        backward    a GEMM, gate_backward, the same weight_grads, expand
                        saved       the same, with u (T, 0)

Weights are saved too; the output of an expert never is. Backward does not write to its inputs, so it may run twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from kernels.eager import differentiable
from kernels.errors import UserError
from kernels.expand import expand, expand_backward
from kernels.ffn import ffn_backward, ffn_forward
from kernels.gate_backward import gate_backward
from kernels.gating import Gating
from kernels.linear import linear_backward, linear_forward
from kernels.packed import Packed, SplitRouters
from kernels.pool import Pool, make_pool
from kernels.route_shrink import route_shrink
from kernels.segments import TaskSegments
from kernels.tiles import ffn_algorithm
from kernels.weight_grad import weight_grads


def _rows(matrix: Tensor) -> Tensor:
    """``matrix``, copied unless the elements of a row are adjacent; rows may have any stride."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _as(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous()


def _setting(
    a: Tensor, routers: Tensor, offsets: Tensor, counts: Sequence[int], *gating: Any
) -> tuple[TaskSegments, Pool]:
    """What every launch is given."""
    return TaskSegments(tuple(counts), offsets), make_pool(a.shape[0], routers.shape[1], *gating)


def _fake(x: Tensor, width: int, a: Tensor, routers: Tensor, *gating: Any) -> tuple[Tensor, ...]:
    """Empty (y, g, P, H, z), y with ``width`` columns."""
    # Not from the cache: sizes may be symbolic.
    pool, full = make_pool.__wrapped__(a.shape[0], routers.shape[1], *gating), torch.float32
    return (
        x.new_empty(len(x), width),
        x.new_empty(len(x), pool.experts, dtype=full),
        x.new_empty(len(routers), pool.columns, dtype=full),
        x.new_empty(len(x), len(a)),
        x.new_empty(len(x), pool.columns, dtype=full),
    )


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _given(dy: Tensor | None, dp: Tensor | None, x: Tensor, z: Tensor, width: int, tasks: int) -> tuple[Tensor, Tensor]:
    """(dY, dP), zeros in place of an absent gradient."""
    through_y = x.new_zeros(len(x), width) if dy is None else dy
    return through_y, z.new_zeros(tasks, z.shape[1]) if dp is None else dp


@torch.library.custom_op("fastmoe_lora::lora_moe", mutates_args=())
def lora_moe_op(
    x: Tensor,
    base: Tensor,
    a: Tensor,
    b: Tensor,
    routers: Tensor,
    offsets: Tensor,
    counts: Sequence[int],
    gating: str,
    k: int,
    shared: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, g, P, H, z)."""
    segments, pool = _setting(a, routers, offsets, counts, gating, k, shared)
    x, base = _rows(x), _rows(base)
    gated, split = x.new_empty(len(x), pool.ranks), SplitRouters.of(routers, x.dtype)
    h, z, g, p = route_shrink(x, _as(a, x.dtype), split, gated, segments, pool)
    return expand(base, gated, _as(b, x.dtype), segments, pool), g, p, h, z


@lora_moe_op.register_fake
def _(x, base, a, b, routers, offsets, counts, gating, k, shared):
    return _fake(x, len(b), a, routers, gating, k, shared)


@torch.library.custom_op("fastmoe_lora::lora_moe_backward", mutates_args=())
def lora_moe_backward_op(
    dy: Tensor,
    dp: Tensor,
    x: Tensor,
    h: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    routers: Tensor,
    offsets: Tensor,
    counts: Sequence[int],
    gating: str,
    k: int,
    shared: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dB, dW), the last three in the types of their parameters."""
    segments, pool = _setting(a, routers, offsets, counts, gating, k, shared)
    x, dy = _rows(x), _rows(dy)
    dh, dz, gated, peak = gate_backward(dy, _as(b, x.dtype), h, z, dp.contiguous(), segments, pool)
    da, db, drouters = weight_grads((dy, x), (gated, dh), (dz, peak), segments, pool)
    dx = expand_backward(None, dh, dz, _as(a, x.dtype), _as(routers, torch.float32), segments, pool)
    return dx, da.to(a.dtype), db.to(b.dtype), drouters.to(routers.dtype)


@lora_moe_backward_op.register_fake
def _(dy, dp, x, h, z, a, b, routers, *rest):
    return _like(x, a, b, routers)


def _save(ctx, inputs, output):
    x, _, a, b, routers, offsets, *static = inputs
    _, g, _, h, z = output
    ctx.static = static
    ctx.set_materialize_grads(False)  # g, H and z have no gradient; zeros for them would be three passes
    ctx.save_for_backward(x, h, z, a, b, routers, offsets)
    ctx.mark_non_differentiable(g, h, z)


def _backward(run, ctx, dy, dg, dp, dh, dz):
    x, _, z, _, b, routers, _ = saved = ctx.saved_tensors  # asked for once, as checkpointing requires
    gradients = run(*_given(dy, dp, x, z, len(b), len(routers)), *saved, *ctx.static)
    return gradients[0], dy, *gradients[1:], None, None, None, None, None


_lora_moe = differentiable(lora_moe_op, lora_moe_backward_op, _save, _backward)


def check_type(x: Tensor) -> None:
    """UserError if the kernels do not compute in x's type."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"--kernel=triton computes in fp32, fp16 or bf16, not in {x.dtype}; use --kernel=reference")
    if x.dtype == torch.bfloat16 and knobs.runtime.interpret:
        raise UserError("Triton's interpreter multiplies bf16 wrongly: use fp32 or fp16 with it, or a GPU")


def lora_moe(
    x: Tensor, base: Tensor, lora: tuple[Tensor, Tensor], routers: Tensor, segments: TaskSegments, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kernels.reference.lora_moe`, in fp32, fp16 or bf16; g is for statistics and has no gradient."""
    check_type(x)
    static = segments.counts, gating.name, gating.k, gating.shared
    y, g, p, _, _ = _lora_moe(x, base, *lora, routers, segments.offsets, *static)
    return y, g, p


@torch.library.custom_op("fastmoe_lora::lora_moe_packed", mutates_args=())
def lora_moe_packed_op(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    routers: Tensor,
    up: Tensor,
    down: Tensor,
    bias_up: Tensor,
    bias_down: Tensor,
    parts: Tensor,
    scales: Tensor,
    offsets: Tensor,
    counts: Sequence[int],
    gating: str,
    k: int,
    shared: int,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, g, P, H, z, u). A and B are read where :class:`Packed` holds them; as arguments they receive gradients."""
    setting = _setting(a, routers, offsets, counts, gating, k, shared)
    packed = Packed.of(up, down, bias_up, bias_down, parts, scales)
    x = _rows(x)
    if packed.hidden:
        return ffn_forward(x, packed, *setting, algorithm or ffn_algorithm(x))
    return *linear_forward(x, packed, *setting), x.new_empty(len(x), 0)


@lora_moe_packed_op.register_fake
def _(x, a, b, routers, up, down, bias_up, bias_down, parts, scales, offsets, counts, gating, k, shared, algorithm):
    return *_fake(x, len(up), a, routers, gating, k, shared), x.new_empty(len(x), len(bias_down))


@torch.library.custom_op("fastmoe_lora::lora_moe_packed_backward", mutates_args=())
def lora_moe_packed_backward_op(
    dy: Tensor,
    dp: Tensor,
    x: Tensor,
    u: Tensor,
    h: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    routers: Tensor,
    up: Tensor,
    down: Tensor,
    bias_up: Tensor,
    bias_down: Tensor,
    parts: Tensor,
    scales: Tensor,
    offsets: Tensor,
    counts: Sequence[int],
    gating: str,
    k: int,
    shared: int,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dB, dW), the last three in the types of their parameters."""
    setting = _setting(a, routers, offsets, counts, gating, k, shared)
    packed = Packed.of(up, down, bias_up, bias_down, parts, scales)
    gradients, x, exact = (_rows(dy), dp.contiguous()), _rows(x), _as(routers, torch.float32)
    if packed.hidden:
        known = algorithm or ffn_algorithm(x)
        dx, da, db, drouters = ffn_backward(gradients, (x, u, h, z), packed, exact, *setting, known)
    else:
        dx, da, db, drouters = linear_backward(gradients, (x, h, z), packed, exact, *setting)
    return dx, da.to(a.dtype), db.to(b.dtype), drouters.to(routers.dtype)


@lora_moe_packed_backward_op.register_fake
def _(dy, dp, x, u, h, z, a, b, routers, *rest):
    return _like(x, a, b, routers)


def _save_packed(ctx, inputs, output):
    x, a, b, routers, *packed, offsets = inputs[:11]
    _, g, _, h, z, u = output
    # Not saved tensors: another pass may pack the same values once more before this one's backward.
    ctx.packed, ctx.static = packed, inputs[11:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, u, h, z, a, b, routers, offsets)
    ctx.mark_non_differentiable(g, h, z, u)


def _packed_backward(run, ctx, dy, dg, dp, dh, dz, du):
    x, _, _, z, _, b, routers, offsets = saved = ctx.saved_tensors
    given = _given(dy, dp, x, z, len(b), len(routers))
    gradients = run(*given, *saved[:-1], *ctx.packed, offsets, *ctx.static)
    return *gradients, *[None] * 12


_lora_moe_packed = differentiable(lora_moe_packed_op, lora_moe_packed_backward_op, _save_packed, _packed_backward)


def lora_moe_packed(
    x: Tensor,
    packed: Packed,
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    segments: TaskSegments,
    gating: Gating,
    algorithm: str = "",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kernels.ffn.ffn_reference` or :func:`kernels.linear.linear_reference`, in fp32, fp16 or bf16.

    ``packed`` holds the frozen weights and the newest values of ``lora`` and ``routers``, in x's type. ``algorithm`` is
    one of :data:`kernels.ffn.ALGORITHMS`, for an FFN; by default the table's for this number of tokens, with
    ``deterministic`` the same for every number.
    """
    check_type(x)
    if packed.hidden and deterministic and not algorithm:
        algorithm = ffn_algorithm(x, deterministic)
    static = segments.counts, gating.name, gating.k, gating.shared, algorithm
    y, g, p, *_ = _lora_moe_packed(x, *lora, routers, *packed.tensors, segments.offsets, *static)
    return y, g, p
