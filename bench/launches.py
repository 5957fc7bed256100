"""Every launch of kernels/ on random tensors, for programs that compile or time them one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import Gating, custom_ops
from kernels.expand import expand
from kernels.gate_backward import gate_backward
from kernels.gating import Pool, make_pool
from kernels.gelu import gelu
from kernels.matmul_gelu import matmul_gelu, matmul_gelu_backward
from kernels.pack import aligned, pack_backward, pack_forward, split_reference
from kernels.route_shrink import route_shrink
from kernels.segments import TaskSegments
from kernels.weight_grad import Parts, empty_parts, reduce, weight_grad

Tensors = dict[str, Tensor]
# The published pools have 64 ranks, the others 128 and 256; together they cover every entry of kernels/tables.json.
POOLS = ("16/3/1/4", "32/6/2/2", "64/12/4/1", "16/3/1/8", "64/12/4/2", "16/3/1/16", "64/12/4/4", "128/8/4/2")
LAUNCHES: dict[str, Callable[[Tensors, TaskSegments, Pool], object]] = {
    "pack_forward": lambda t, segments, pool: pack_forward(t["w2"], _masters(t), t["x"].dtype),
    "pack_backward": lambda t, segments, pool: pack_backward((t["w1"], t["w2"]), _masters(t), t["x"].dtype),
    "route_shrink": lambda t, segments, pool: route_shrink(
        t["x"], t["a"], (t["parts"], t.get("scales")), t["h"], segments, pool
    ),
    "expand": lambda t, segments, pool: expand(t["x"], t["h"], t["b"], pool),
    "gate_backward": lambda t, segments, pool: gate_backward(
        t["buffer"][:, t["wide"].shape[1] :], aligned(pool.ranks), (t["h"], t["z"]), t["dp"], segments, pool
    ),
    "weight_grad_a": lambda t, segments, pool: weight_grad(
        t["x"], t["h"], t["dz"], _parts(t, segments, pool), segments, pool
    ),
    "weight_grad_b": lambda t, segments, pool: weight_grad(
        t["x"], t["h"], None, _parts(t, segments, pool), segments, pool
    ),
    "reduce": lambda t, segments, pool: reduce(_parts(t, segments, pool), segments),
    "matmul_gelu": lambda t, segments, pool: matmul_gelu(
        t["x"], t["w1"], t["b1"], t["buffer"][:, : t["wide"].shape[1]], pool
    ),
    "matmul_gelu_backward": lambda t, segments, pool: matmul_gelu_backward(
        t["x"], t["up"], t["wide"], t["buffer"][:, : t["up"].shape[1]], pool
    ),
    "gelu": lambda t, segments, pool: gelu(t["wide"], t["buffer"]),
    "gelu_backward": lambda t, segments, pool: gelu(t["wide"], t["buffer"], backward=True),
}


def _masters(t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """The adapters as training has them, in fp32."""
    return t["a"].float(), t["b"].float(), t["routers"]


def _parts(t: Tensors, segments: TaskSegments, pool: Pool) -> Parts:
    return empty_parts(t["x"], t["x"], t["h"], segments, pool)


def parse_pool(text: str) -> Pool:
    """The pool of ``"N/k/S/r"`` under ase gating."""
    experts, k, shared, rank = map(int, text.split("/"))
    gating = Gating("ase", k, shared)
    return make_pool(experts * rank, gating.router_columns(experts), gating.text)


def make_tensors(pool: Pool, counts: tuple[int, ...], width: int, like: Tensor) -> Tensors:
    """Random inputs of all launches, for an FFN ``width`` wide; ``like`` gives the dtype and the device."""
    tokens, tasks, ranks, hidden = sum(counts), len(counts), pool.ranks, 4 * width
    half = {
        "x": (tokens, width),
        "wide": (tokens, hidden),
        "buffer": (tokens, hidden + aligned(ranks) + aligned(tasks * pool.columns)),
        "h": (tokens, ranks),
        "a": (ranks, width),
        "b": (width, ranks),
        "w1": (hidden, width),
        "b1": (hidden,),
        "w2": (width, hidden),
        "b2": (width,),
        "up": (width, hidden + aligned(ranks)),
    }
    full = {"z": (tokens, pool.columns), "dp": (tasks, pool.columns), "routers": (tasks, pool.columns, width)}
    made = {name: torch.randn(shape, device=like.device).to(like.dtype) for name, shape in half.items()}
    made |= {name: torch.randn(shape, device=like.device) for name, shape in full.items()}
    made["dz"] = torch.cat([made["z"]] * 2, 1).to(like.dtype) if like.dtype == torch.bfloat16 else made["z"]
    if like.dtype == torch.float32:
        return made | {"parts": made["routers"]}
    high, low, scales = split_reference(made["routers"], like.dtype)
    return made | {"parts": torch.stack([high, low])} | ({"scales": scales} if like.dtype == torch.float16 else {})


class AdaptedFFN:
    """Both passes of an adapted FFN ``width`` wide over random tensors; ``like`` gives the dtype and the device.
    ``algorithm`` is one of :data:`kernels.custom_ops.ALGORITHMS`. The adapters are fp32 masters, as in training."""

    def __init__(self, pool: Pool, segments: TaskSegments, width: int, like: Tensor, algorithm: str) -> None:
        assert segments.counts is not None
        self.t = make_tensors(pool, segments.counts, width, like)
        self.adapters: tuple[Any, ...] = (
            *_masters(self.t),
            segments.offsets,
            segments.length,
            f"{pool.gating.text}/{algorithm}",
        )

    def forward(self) -> None:
        t = self.t
        _, _, _, *self.saved = custom_ops.forward(t["x"], None, t["w1"], t["b1"], t["w2"], t["b2"], *self.adapters)

    def backward(self) -> None:
        """After :meth:`forward`; x serves as dY."""
        t = self.t
        given: list[Any] = [t["x"], t["dp"], t["x"], *self.saved, t["w1"], t["w2"], *self.adapters, True]
        custom_ops.backward(*given)
