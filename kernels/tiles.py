"""Tile sizes: a fixed table by kernel, element size and columns held, so that rounding never depends on a search.

A row of a tile holds its ranks and its gates or logits in registers: NP (r + 1) columns. Every entry compiles without
spills for sm_80, sm_89, sm_90 and gfx942 and fits their shared memory (bench/results/aot.json). Products in half
precision have at least 64 rows, which Hopper's wgmma needs, but for grad_rank where a row holds more than 272.
"""

import torch

from kernels.errors import UserError
from kernels.pool import Pool

MOST_RANKS = 256  # NP r

# kernel: {element size in bytes: {up to so many columns: (block, step, warps, stages)}}
TABLE = {
    "route_shrink": {
        2: {96: (64, 64, 4, 3), 128: (64, 64, 8, 3), 192: (64, 32, 4, 3), 512: (64, 16, 8, 3)},
        4: {96: (32, 32, 4, 2), 192: (32, 16, 4, 2), 512: (16, 16, 8, 2)},
    },
    "expand": {
        2: {96: (64, 128, 4, 2), 192: (64, 32, 4, 2), 512: (64, 16, 8, 2)},
        4: {128: (32, 32, 4, 2), 192: (32, 16, 4, 2), 512: (32, 16, 8, 2)},
    },
    "grad_rank": {
        2: {128: (64, 64, 4, 3), 192: (64, 64, 8, 3), 272: (64, 32, 8, 3), 512: (32, 32, 8, 3)},
        4: {128: (32, 32, 4, 2), 192: (32, 16, 4, 2), 512: (32, 16, 8, 2)},
    },
    "gram_a": {
        2: {96: (512, 16, 8, 2), 144: (256, 16, 8, 3), 320: (128, 16, 8, 3), 512: (64, 16, 8, 3)},
        4: {128: (128, 16, 8, 2), 192: (64, 16, 8, 2), 512: (32, 16, 8, 2)},
    },
    "gram_b": {
        2: {96: (512, 16, 8, 3), 128: (512, 16, 8, 2), 192: (256, 16, 8, 4), 512: (128, 16, 8, 3)},
        4: {128: (128, 16, 8, 3), 192: (64, 16, 8, 3), 512: (32, 16, 4, 3)},
    },
}
NAMES = {
    "route_shrink": ("BM", "BK"), "expand": ("BM", "BN"), "grad_rank": ("BM", "BK"),
    "gram_a": ("BW", "BT"), "gram_b": ("BW", "BT"),
}  # fmt: skip


def tile(kernel: str, dtype: torch.dtype, pool: Pool) -> dict[str, int]:
    """The launch's tile sizes and Triton's options, by name."""
    if pool.padded * pool.rank > MOST_RANKS:
        raise UserError(
            f"the Triton kernels hold up to N*r = {MOST_RANKS} expert rows, N padded to a power of two; "
            f"{pool.experts} experts of rank {pool.rank} need --kernel=reference"
        )
    if pool.rank & (pool.rank - 1):
        raise UserError(
            f"the Triton kernels take ranks that are powers of two, not rank {pool.rank}; use --kernel=reference"
        )
    held = pool.padded * (pool.rank + 1)
    rows = TABLE[kernel][dtype.itemsize]
    block, step, warps, stages = rows[min(limit for limit in rows if held <= limit)]
    sizes = dict(zip(NAMES[kernel], (block, step), strict=True))
    # The default of FP fusion (a * b + c in one rounding) differs between versions of Triton.
    return sizes | {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
