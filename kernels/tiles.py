"""Tuned tile sizes and FFN algorithm per architecture.

``tables.json`` is fixed, so that rounding never depends on a search at run time. ``python -m bench.tune`` measures a
new row for the GPU at hand. An architecture without a row uses the default and warns once. The rows of sm_90 and gfx942
come from what the compilers report and a model of latency, not from a clock.

Tile sizes depend on Pool.tile_columns, the columns that a kernel keeps in registers per token. Every entry compiles
without spills and fits shared memory on sm_80, sm_89 and sm_90 with Triton 3.9 and on sm_90 with 3.6
(bench/results/aot.json and aot-3.6.json); on sm_100 three rows spill 8 bytes, and ``pytest -m long`` compiles for
gfx942. On sm_90 half-precision products have at least 64 rows, which wgmma needs.
"""

import json
import warnings
from functools import cache
from importlib import resources

import torch
from triton import knobs

from kernels.errors import UserError
from kernels.gating import MOST_RANKS, Pool, fits_one_tile

LARGE = 16_384  # tokens from which the FFN uses the algorithm that was fastest for large batches
# Times as many rows in a tile of a kernel that only copies or adds: the interpreter takes as long for one of any size.
TALLER = 16 if knobs.runtime.interpret else 1

# architecture: {kernel: {bytes of an element: {at most so many columns: (the sizes of NAMES, warps, stages)}}}
TABLES = json.loads((resources.files("kernels") / "tables.json").read_text())
NAMES = {
    "route_shrink": ("BM", "BK"), "expand": ("BM", "BN"), "gate_backward": ("BM",),
    "weight_grad_a": ("BW", "BT"), "weight_grad_b": ("BW", "BT"), "matmul_gelu": ("BM", "BN", "BK"),
}  # fmt: skip


@cache
def architecture(device: torch.device) -> str:
    """The device's name in the tables, such as sm_90."""
    if device.type != "cuda":
        return "default"
    found = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if torch.version.hip:
        found = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    if found not in TABLES:
        fault = f"no tile sizes were tuned for {found}, the default ones are used (python -m bench.tune)"
        warnings.warn(fault, stacklevel=2)
    return found


def has_descriptors(device: torch.device) -> bool:
    """Whether Triton's tensor descriptors are copies in hardware (TMA) there; the interpreter takes them too."""
    name = architecture(device)
    return name == "default" or name.startswith("sm_") and int(name[3:]) >= 90


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; without one those of an H100, which bench.static models."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _row(name: str, device: torch.device) -> dict:
    return TABLES.get(architecture(device), {}).get(name, TABLES["default"][name])


@cache
def tile(kernel: str, device: torch.device, dtype: torch.dtype, pool: Pool) -> dict[str, int]:
    """Tile sizes and Triton's options, by name, for a launch over tokens; looked up once, not for every launch."""
    if not fits_one_tile(pool.experts, pool.rank):
        raise UserError(
            f"one register tile takes up to N*r = {MOST_RANKS} expert rows, N padded to a power of two, and ranks that "
            f"are powers of two; {pool.experts} experts of rank {pool.rank} need kernels.lora_moe, which has no limit"
        )
    rows = _row(kernel, device)[str(dtype.itemsize)]
    *sizes, warps, stages = rows[str(min(limit for limit in map(int, rows) if pool.tile_columns <= limit))]
    # The default of FP fusion (a * b + c with one rounding) differs between versions of Triton.
    rest = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return dict(zip(NAMES[kernel], sizes, strict=True)) | rest


def ffn_algorithm(device: torch.device, large: bool) -> str:
    """The one of :data:`kernels.custom_ops.ALGORITHMS` that was fastest for at least LARGE tokens, or for fewer."""
    return _row("ffn", device)["large" if large else "small"]
