"""Every launch of kernels/ on random tensors, for programs that compile or time them one by one."""

from collections.abc import Callable
from typing import Any

import torch
from kernels.ffn import ffn_backward, ffn_forward
from kernels.matmul import matmul, matmul_routed
from kernels.packed import Packed, SplitRouters
from kernels.pool import Pool
from kernels.reduce import reduce
from torch import Tensor

from fastmoe_lora import MoEConfig
from kernels.expand import expand, expand_backward
from kernels.gate_backward import gate_backward, gate_backward_inplace
from kernels.gelu import gelu, gelu_backward
from kernels.matmul_gelu import matmul_gelu, matmul_gelu_backward
from kernels.route_shrink import route_shrink
from kernels.segments import TaskSegments
from kernels.weight_grad import partial_sums, weight_grad_a, weight_grad_b

Tensors = dict[str, Any]  # tensors by name, and the split routers
# The published pools have 64 ranks, the others 128 and 256; together they cover every entry of kernels/tables.json.
POOLS = ("16/3/1/4", "32/6/2/2", "64/12/4/1", "16/3/1/8", "64/12/4/2", "16/3/1/16", "64/12/4/4", "128/8/4/2")
LAUNCHES: dict[str, Callable[[Tensors, TaskSegments, Pool], object]] = {
    "route_shrink": lambda t, segments, pool: route_shrink(t["x"], t["a"], t["split"], t["h"], segments, pool),
    "expand": lambda t, segments, pool: expand(t["x"], t["h"], t["b"], segments, pool),
    "expand_backward": lambda t, segments, pool: expand_backward(
        t["x"], t["h"], t["dz"], t["a"], t["routers"], segments, pool
    ),
    "gate_backward": lambda t, segments, pool: gate_backward(t["x"], t["b"], t["h"], t["z"], t["dp"], segments, pool),
    "gate_backward_inplace": lambda t, segments, pool: gate_backward_inplace(
        t["buffer"][:, t["wide"].shape[1] :], t["h"].shape[1], t["h"], t["z"], t["dp"], segments, pool
    ),
    "weight_grad_a": lambda t, segments, pool: weight_grad_a(
        t["x"], t["h"], (t["dz"], t["peak"]), _parts(t, segments, pool)[1:], segments, pool
    ),
    "weight_grad_b": lambda t, segments, pool: weight_grad_b(
        t["x"], t["h"], _parts(t, segments, pool)[0], segments, pool
    ),
    "reduce": lambda t, segments, pool: reduce(*_parts(t, segments, pool)),
    "matmul": lambda t, segments, pool: matmul(t["wide"], t["up"].t(), t["bias"], segments, pool),
    "matmul_routed": lambda t, segments, pool: matmul_routed(
        t["wide"], t["down"], t["dz"], t["routers"], segments, pool
    ),
    "matmul_gelu": lambda t, segments, pool: matmul_gelu(
        t["x"], t["down"], t["bias_down"], t["buffer"][:, : t["wide"].shape[1]], pool
    ),
    "matmul_gelu_backward": lambda t, segments, pool: matmul_gelu_backward(
        t["x"], t["up_b"], t["wide"], t["buffer"][:, : t["up_b"].shape[1]], pool
    ),
    "gelu": lambda t, segments, pool: gelu(t["wide"], t["buffer"]),
    "gelu_backward": lambda t, segments, pool: gelu_backward(t["wide"], t["buffer"]),
}


def _parts(t: Tensors, segments: TaskSegments, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    return partial_sums(t["x"], t["x"], t["h"], segments, pool)


def parse_pool(text: str) -> Pool:
    """The pool of ``"N/k/S/r"`` under ase gating."""
    config = MoEConfig.parse(text, "ase")
    return Pool(config.experts, config.gating.router_columns(config.experts), config.rank, config.gating)


def make_tensors(pool: Pool, counts: tuple[int, ...], width: int, like: Tensor) -> Tensors:
    """Random inputs of all launches, for an FFN ``width`` wide; ``like`` gives the dtype and the device."""
    tokens, tasks, ranks, hidden = sum(counts), len(counts), pool.ranks, 4 * width
    half = {
        "x": (tokens, width),
        "wide": (tokens, hidden),
        "buffer": (tokens, hidden + ranks + tasks * pool.columns),
        "h": (tokens, ranks),
        "a": (ranks, width),
        "b": (width, ranks),
        "up": (width, hidden),
        "up_b": (width, hidden + ranks),
        "down": (hidden, width),
        "bias": (width,),
        "bias_down": (hidden,),
    }
    full = {
        "z": (tokens, pool.columns),
        "dp": (tasks, pool.columns),
        "routers": (tasks, pool.columns, width),
        "peak": (),
    }
    made = {name: torch.randn(shape, device=like.device).to(like.dtype) for name, shape in half.items()}
    made |= {name: torch.randn(shape, device=like.device) for name, shape in full.items()}
    split = like.dtype == torch.bfloat16
    made["dz"] = torch.cat([made["z"]] * 2, 1).to(like.dtype) if split else made["z"]
    return made | {"split": SplitRouters.of(made["routers"], like.dtype)}


class AdaptedFFN:
    """Both passes of an adapted FFN ``width`` wide over random tensors; ``like`` gives the dtype and the device.
    ``algorithm`` is one of :data:`kernels.ffn.ALGORITHMS`, with " stacked" behind it for stacked weights."""

    def __init__(self, pool: Pool, segments: TaskSegments, width: int, like: Tensor, algorithm: str) -> None:
        name, _, stacked = algorithm.partition(" ")
        self.setting, self.t = (segments, pool, name), make_tensors(pool, segments.counts, width, like)
        t = self.t
        adapters = t["a"], t["b"], t["routers"]
        self.packed = Packed.empty((width, 4 * width, width), adapters, like.dtype, bool(stacked))
        self.packed.fill_frozen((t["up"].t(), None), (t["down"].t(), None))
        self.packed.fill(*adapters)

    def forward(self) -> None:
        _, _, _, h, z, u = ffn_forward(self.t["x"], self.packed, *self.setting)
        self.saved = self.t["x"], u, h, z

    def backward(self) -> None:
        """After :meth:`forward`; x serves as dY."""
        gradients = self.t["x"], self.t["dp"]
        ffn_backward(gradients, self.saved, self.packed, self.t["routers"], *self.setting)
