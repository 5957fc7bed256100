"""reduce: the fp32 partial sums of all weight gradients, added by one launch.

    dB = sum over chunks,  dA = sum over chunks,  dW_task = sum over the chunks of the task

Grid (block): a program adds BN numbers of one result over their partial sums. It keeps BP running sums, so that BP
loads are under way at once where one after the other would wait for each; the order depends on shapes only. Bytes:
every partial sum read, every result written.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.segments import ceil_div

BP, BN = 16, 256


def reduce_reference(db: Tensor, da: Tensor, drouters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dA, dB, dW)."""
    return da.sum(0), db.sum(0), drouters.sum(1)


@triton.jit
def add_parts(parts, total, block, count, size, BP: tl.constexpr, BN: tl.constexpr):
    """A block of total (.., size) = sum over ``count`` of parts (.., count, size)."""
    blocks = tl.cdiv(size, BN)
    outer, at = (block // blocks).to(tl.int64), block % blocks * BN + tl.arange(0, BN)
    inside = at < size
    running = tl.zeros((BP, BN), tl.float32)
    for first in range(0, count, BP):
        part = (first + tl.arange(0, BP))[:, None]
        running += tl.load(parts + (outer * count + part) * size + at[None, :], (part < count) & inside[None, :], 0.0)
    tl.store(total + outer * size + at, tl.sum(running, 0), inside)


@triton.jit
def reduce_kernel(
    db_parts, da_parts, routers_parts, db, da, routers, b_count, a_count, router_count, b_size, a_size, router_size,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    b_blocks, a_blocks = tl.cdiv(b_size, BN), tl.cdiv(a_size, BN)
    if block < b_blocks:
        add_parts(db_parts, db, block, b_count, b_size, BP, BN)
    elif block < b_blocks + a_blocks:
        add_parts(da_parts, da, block - b_blocks, a_count, a_size, BP, BN)
    else:
        add_parts(routers_parts, routers, block - b_blocks - a_blocks, router_count, router_size, BP, BN)


def reduce(db: Tensor, da: Tensor, drouters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dA (R, d), dB (D, R), dW (tasks, C, d)) fp32 from the partial sums of :mod:`kernels.weight_grad`:
    (chunks, D, R), (chunks, R, d) and (tasks, chunks, C, d), contiguous."""
    tasks, chunks, columns, d = drouters.shape
    sums = da.new_empty(da.shape[1:]), db.new_empty(db.shape[1:]), da.new_empty(tasks, columns, d)
    sizes = db[0].numel(), da[0].numel(), columns * d
    blocks = ceil_div(sizes[0], BN) + ceil_div(sizes[1], BN) + tasks * ceil_div(sizes[2], BN)
    reduce_kernel[(blocks,)](
        db, da, drouters, sums[1], sums[0], sums[2], len(db), len(da), chunks, *sizes,
        BP=BP, BN=BN, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return sums
