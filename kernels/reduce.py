"""reduce: the fp32 partial sums of all weight gradients, added by one launch.

    dB = sum over tasks and chunks,  dA = sum over tasks and chunks,  dW_task = sum over the chunks of the task

Grid (block): a program adds BN numbers of [dB | dA | dW] over all partial sums, task by task, so that every program
does the same work. It keeps BP running sums, so that BP loads are under way at once where one after the other would
wait for each; the order depends on shapes only. Bytes: every partial sum read, every result written.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.segments import ceil_div

BP, BN = 8, 256


def reduce_reference(db: Tensor, da: Tensor, drouters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dA, dB, dW)."""
    return da.sum((0, 1)), db.sum((0, 1)), drouters.sum(1)


@triton.jit
def reduce_kernel(
    parts, db, da, routers, chunks, b_size, a_size, router_size,
    TASKS: tl.constexpr, ROUNDS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * BN + tl.arange(0, BN)
    shared, size = b_size + a_size, b_size + a_size + router_size
    total = tl.zeros((BN,), tl.float32)
    for task in tl.static_range(TASKS):
        running = tl.zeros((BP, BN), tl.float32)
        for first in tl.static_range(0, ROUNDS * BP, BP):
            chunk = (first + tl.arange(0, BP))[:, None]
            place = (task * chunks + chunk).to(tl.int64) * size + number[None, :]
            running += tl.load(parts + place, (chunk < chunks) & (number < size)[None, :], 0.0)
        own = tl.sum(running, 0)
        tl.store(routers + task * router_size + number - shared, own, (number >= shared) & (number < size))
        total += own
    tl.store(db + number, total, number < b_size)
    tl.store(da + number - b_size, total, (number >= b_size) & (number < shared))


def reduce(db: Tensor, da: Tensor, drouters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dA (R, d), dB (D, R), dW (tasks, C, d)) fp32 from :func:`kernels.weight_grad.partial_sums`."""
    tasks, chunks = db.shape[:2]
    sums = da.new_empty(da.shape[2:]), db.new_empty(db.shape[2:]), da.new_empty(tasks, *drouters.shape[2:])
    sizes = sums[1].numel(), sums[0].numel(), sums[2].numel() // tasks
    reduce_kernel[(ceil_div(sum(sizes), BN),)](
        db, sums[1], sums[0], sums[2], chunks, *sizes,
        TASKS=tasks, ROUNDS=ceil_div(chunks, BP), BP=BP, BN=BN, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return sums
