"""pack: the wide matrices of one pass, made from the parameters, casts included, in one launch.

    up      [W2 | B | 0]                    (D, F + R, padded)
    down    [W1 ; A ; W_tasks ; 0]          (F + R + tasks C, padded, d)     backward
            [A ; high ; low]                (R + 2 tasks C, d)               forward, in half precision

R and tasks C are rounded up to multiples of 8, so that rows begin at multiples of 16 bytes. W2 and W1 are left out
where the frozen layer has no such product. high and low are the fp32 routers as sums of two half-precision matrices,
exact to 2^-17; for fp16 they are divided by a power of two for each task, ``scales``, which keeps small values.

Nothing that is packed outlives the pass: an adapted layer depends on its parameters alone.
Bytes: every parameter read and written once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles import TALLER

BM, BN = 8, 512


def aligned(columns: int) -> int:
    """``columns`` rounded up to a multiple of 8."""
    return columns + -columns % 8


def up_reference(w2: Tensor | None, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([m.to(dtype) for m in (w2, _padded(b.t()).t()) if m is not None], 1)


def down_reference(w1: Tensor | None, a: Tensor, routers: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([m.to(dtype) for m in (w1, _padded(a), _padded(routers.flatten(0, 1))) if m is not None])


def _padded(matrix: Tensor) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, aligned(len(matrix)) - len(matrix)))


def split_reference(routers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(high, low, scales (tasks,)): W_task = scale (high + low)."""
    scales = router_scales(routers, dtype)
    exact = routers.float() / scales[:, None, None]
    high = exact.to(dtype)
    return high, (exact - high.float()).to(dtype), scales


def router_scales(routers: Tensor, dtype: torch.dtype) -> Tensor:
    """(tasks,) fp32, powers of two: for fp16 near the largest magnitude of a task's router, else 1."""
    ones = torch.ones(len(routers), dtype=torch.float32, device=routers.device)
    if dtype != torch.float16:
        return ones
    largest = torch.linalg.vector_norm(routers.float(), torch.inf, dim=(1, 2))
    return torch.ldexp(ones, torch.frexp(largest).exponent.clamp(-100, 100))


@triton.jit
def copy_tile(index, source, source_stride, target, target_stride, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Copy tile ``index`` of a matrix, with a cast, if it has that tile. Returns the index in the next matrix."""
    across = tl.cdiv(columns, BN)
    tiles = tl.cdiv(rows, BM) * across
    if (index >= 0) & (index < tiles):
        row = (index // across * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
        column = index % across * BN + tl.arange(0, BN)[None, :]
        inside = (row < rows) & (column < columns)
        value = tl.load(source + row * source_stride + column, inside)
        tl.store(target + row * target_stride + column, value.to(target.dtype.element_ty), inside)
    return index - tiles


@triton.jit
def pack_kernel(
    w2, b, up, w1, a, routers, scales, down, D, F, R, up_stride, d, hidden, router_row, router_rows, C,
    W2: tl.constexpr, DOWN: tl.constexpr, W1: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    if W2:
        index = copy_tile(index, w2, F, up, up_stride, D, F, BM, BN)
    index = copy_tile(index, b, R, up + F, up_stride, D, R, BM, BN)
    if DOWN:
        if W1:
            index = copy_tile(index, w1, d, down, d, hidden, d, BM, BN)
        index = copy_tile(index, a, d, down + hidden * d, d, R, d, BM, BN)
        across = tl.cdiv(d, BN)
        if (index >= 0) & (index < tl.cdiv(router_rows, BM) * across):
            row = (index // across * BM + tl.arange(0, BM))[:, None]
            column = index % across * BN + tl.arange(0, BN)[None, :]
            inside = (row < router_rows) & (column < d)
            value = tl.load(routers + row * d + column, inside, 0.0).to(tl.float32)
            if SCALED:
                value /= tl.load(scales + row // C, row < router_rows, 1.0)
            high = value.to(down.dtype.element_ty)
            target = down + (router_row + row) * d + column
            tl.store(target, high, inside)
            if SPLIT:
                rest = (value - high.to(tl.float32)).to(down.dtype.element_ty)
                tl.store(target + router_rows * d, rest, inside)


def pack_forward(
    w2: Tensor | None, adapters: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(up, A, routers, scales) in ``dtype``, from w2 (D, F) and (A (R, d), B (D, R), routers (tasks, C, d)).

    The routers are (tasks, C, d) in fp32, else (2, tasks, C, d), high and low; ``scales`` is None but for fp16.
    """
    a, b, routers = adapters
    (ranks, d), scales = a.shape, None
    if dtype == a.dtype == routers.dtype == torch.float32:
        typed, parts, down = a.contiguous(), routers.contiguous(), None
    else:
        copies = 1 if dtype == torch.float32 else 2
        down = a.new_empty(ranks + copies * routers.shape[0] * routers.shape[1], d, dtype=dtype)
        typed, parts = down[:ranks], down[ranks:].view(*((2,) * (copies > 1)), *routers.shape)
        scales = router_scales(routers, dtype) if dtype == torch.float16 else None
    if down is None and w2 is None and b.dtype == dtype:
        return b.contiguous(), typed, parts, scales
    up = _launch((w2, b), (None, a, routers, scales), down, ranks, dtype, split=dtype != torch.float32)
    return up, typed, parts, scales


def pack_backward(
    frozen: tuple[Tensor | None, Tensor | None], adapters: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(up, down) in ``dtype``, from (W1 (F, d), W2 (D, F)) and (A, B, routers)."""
    (w1, w2), (a, b, routers) = frozen, adapters
    (ranks, d), rows = a.shape, routers.shape[0] * routers.shape[1]
    router_row = ranks + -ranks % 8 + (0 if w1 is None else len(w1))
    make = a.new_zeros if ranks % 8 or rows % 8 else a.new_empty
    down = make(router_row + rows + -rows % 8, d, dtype=dtype)
    return _launch((w2, b), (w1, a, routers, None), down, router_row, dtype), down


def _launch(
    columns: tuple[Tensor | None, Tensor],
    rows: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
    down: Tensor | None,
    router_row: int,
    dtype: torch.dtype,
    split: bool = False,
) -> Tensor:
    """up, of ``columns`` (w2, b). Fills ``down`` from ``rows`` (w1, a, routers, scales), the routers from
    ``router_row`` on; ``split`` writes them twice, high and low."""
    (w2, b), (w1, a, routers, scales) = columns, rows
    (width, ranks), d = b.shape, a.shape[1]
    inner, hidden = 0 if w2 is None else w2.shape[1], 0 if w1 is None else len(w1)
    up = (b.new_zeros if ranks % 8 else b.new_empty)(width, inner + ranks + -ranks % 8, dtype=dtype)
    router_rows = routers.shape[0] * routers.shape[1]
    copied = [(width, inner), (width, ranks)]
    if down is not None:
        copied += [(hidden, d), (ranks, d), (router_rows, d)]
    bm = BM * TALLER
    pack_kernel[(sum(math.ceil(height / bm) * math.ceil(across / BN) for height, across in copied),)](
        b if w2 is None else w2.contiguous(), b.contiguous(), up, a if w1 is None else w1.contiguous(), a.contiguous(),
        routers.contiguous(), routers if scales is None else scales, up if down is None else down,
        width, inner, ranks, up.stride(0), d, hidden, router_row, router_rows, routers.shape[1],
        W2=w2 is not None, DOWN=down is not None, W1=w1 is not None, SPLIT=split, SCALED=scales is not None,
        BM=bm, BN=BN, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return up
