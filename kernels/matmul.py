"""matmul: a GEMM over the tokens with bias and router terms fused in.

    forward     y = [a | H'] [W2 | B]^T + b2                (T, D)
    backward    dx = [du | dH] [W1 ; A] + dz W_task         (T, d)

Grid (tile, task): tiles of BM tokens by BN columns; a tile never spans two tasks. Programs run through eight rows of
tiles column by column, so that the tokens of those rows stay in the L2. dz W_task is the last step of the K loop.
Bytes: T (K es + N es), weights from the L2. FLOPs: 2 T K N.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jit_helpers import dot_exact, task_rows
from kernels.pool import Pool
from kernels.segments import TaskSegments, ceil_div
from kernels.tiles import tile


def matmul_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight + bias."""
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def matmul_routed_reference(x: Tensor, weight: Tensor, dz: Tensor, routers: Tensor, segments: TaskSegments) -> Tensor:
    """x weight + dz W_task."""
    through_routers = [run @ router for run, router in zip(dz.split(segments.counts), routers, strict=True)]
    return x @ weight + torch.cat(through_routers).to(x.dtype)


@triton.jit
def matmul_kernel(
    x, weight, bias, dz, routers, y, offsets, x_stride, weight_inner, weight_outer, dz_stride, K, WIDTH, C,
    BIAS: tl.constexpr, ROUTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr = 8,
):  # fmt: skip
    columns = tl.cdiv(WIDTH, BN)
    group, place = tl.program_id(0) // (GROUP * columns), tl.program_id(0) % (GROUP * columns)
    height = tl.minimum(tl.num_programs(0) // columns - group * GROUP, GROUP)
    rows, inside = task_rows(offsets, group * GROUP + place % height, BM)
    outer = (place // height * BN + tl.arange(0, BN))[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        across, down = inner[None, :], inner[:, None]
        tokens = tl.load(x + rows * x_stride + across, inside & (across < K), 0.0)
        weights = tl.load(weight + down * weight_inner + outer * weight_outer, (down < K) & (outer < WIDTH), 0.0)
        total = tl.dot(tokens, weights, total, input_precision="ieee")
    if ROUTED:
        for start in range(0, C, 16):
            column, row = start + tl.arange(0, 16)[None, :], start + tl.arange(0, 16)[:, None]
            logits = tl.load(dz + rows * dz_stride + column, inside & (column < C), 0.0).to(x.dtype.element_ty)
            router = routers + (tl.program_id(1) * C + row) * WIDTH + outer
            total = dot_exact(logits, tl.load(router, (row < C) & (outer < WIDTH), 0.0), total)
    if BIAS:
        total += tl.load(bias + outer, outer < WIDTH, 0.0).to(tl.float32)
    tl.store(y + rows * WIDTH + outer, total.to(y.dtype.element_ty), inside & (outer < WIDTH))


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, segments: TaskSegments, pool: Pool) -> Tensor:
    """x weight + bias (T, width): x (T, K) with any row stride, weight (K, width) with any strides, bias (width,) or
    None."""
    return _launch(x, weight, bias, None, segments, pool)


def matmul_routed(x: Tensor, weight: Tensor, dz: Tensor, routers: Tensor, segments: TaskSegments, pool: Pool) -> Tensor:
    """x weight + dz W_task (T, width); dz as gate_backward returns it, routers (tasks, C, width) fp32."""
    return _launch(x, weight, None, (dz, routers), segments, pool)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routed: tuple[Tensor, Tensor] | None,
    segments: TaskSegments,
    pool: Pool,
) -> Tensor:
    y = x.new_empty(len(x), weight.shape[1])
    dz, routers = routed or (x, x)  # x stands for absent tensors, which the kernel does not read
    sizes = tile("matmul", x, pool)
    blocks, tasks = segments.grid(sizes["BM"])
    matmul_kernel[(blocks * ceil_div(y.shape[1], sizes["BN"]), tasks)](
        x, weight, x if bias is None else bias, dz, routers, y, segments.offsets, x.stride(0), *weight.stride(),
        dz.stride(0), *weight.shape, pool.columns, BIAS=bias is not None, ROUTED=routed is not None, **sizes,
    )  # fmt: skip
    return y
