"""Tile sizes: a fixed table by kernel, element size and rank width, so that rounding never depends on a search.

Rank width is NP * r, the padded R. Every entry compiles without spills (bench/results/aot.json).
"""

import torch

from kernels.errors import UserError
from kernels.pool import Pool

WIDTHS = (64, 128, 256)  # rank widths: up to 64, 128, 256

# kernel: {element size in bytes: one (block, step, warps, stages) per rank width}
TABLE = {
    "route_shrink": {2: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 3)), 4: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 16, 8, 2))},
    "expand": {2: ((64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)), 4: ((32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2))},
    "grad_rank": {2: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 3)), 4: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 16, 8, 2))},
    "gram": {2: ((512, 32, 8, 3), (256, 32, 8, 3), (128, 32, 8, 3)), 4: ((128, 16, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2))},
}
NAMES = {"route_shrink": ("BM", "BK"), "expand": ("BM", "BN"), "grad_rank": ("BM", "BK"), "gram": ("BW", "BT")}


def tile(kernel: str, dtype: torch.dtype, pool: Pool) -> dict[str, int]:
    """The launch's tile sizes, warps and pipeline stages, by name."""
    width = pool.padded * pool.rank
    if width > WIDTHS[-1]:
        raise UserError(f"the Triton kernels hold up to N*r = {WIDTHS[-1]} expert rows, N padded to a power of two; "
                        f"{pool.experts} experts of rank {pool.rank} need --kernel=reference")
    place = next(i for i, limit in enumerate(WIDTHS) if width <= limit)
    block, step, warps, stages = TABLE[kernel][dtype.itemsize][place]
    return dict(zip(NAMES[kernel], (block, step), strict=True)) | {"num_warps": warps, "num_stages": stages}
