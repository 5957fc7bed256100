"""Every launch of kernels/ on made-up tensors, for what compiles or times them one by one."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.expand import expand, expand_backward
from kernels.ffn import ffn_backward, ffn_forward
from kernels.gating import Gating
from kernels.gelu import gelu, gelu_backward
from kernels.grad_rank import grad_rank, grad_rank_given
from kernels.gram import gram_a, gram_b
from kernels.matmul import matmul, matmul_routed
from kernels.packed import Packed
from kernels.pool import Pool
from kernels.route_shrink import route_shrink
from kernels.rows import TaskRows

Tensors = dict[str, Tensor]
# Ranks of 64 for the published pools, then 128 and 256: every entry of kernels/tables.json.
POOLS = ("16/3/1/4", "32/6/2/2", "64/12/4/1", "16/3/1/8", "64/12/4/2", "16/3/1/16", "64/12/4/4", "128/8/4/2")
LAUNCHES: dict[str, Callable[[Tensors, TaskRows, Pool], object]] = {
    "route_shrink": lambda t, rows, pool: route_shrink(t["x"], t["a"], t["routers"], t["h"], rows, pool),
    "expand": lambda t, rows, pool: expand(t["x"], t["h"], t["b"], rows, pool),
    "expand_backward": lambda t, rows, pool: expand_backward(t["x"], t["h"], t["z"], t["a"], t["routers"], rows, pool),
    "grad_rank": lambda t, rows, pool: grad_rank(t["x"], t["b"], t["h"], t["z"], t["dp"], rows, pool),
    "grad_rank_given": lambda t, rows, pool: grad_rank_given(
        t["space"][:, t["wide"].shape[1] :], t["h"].shape[1], t["h"], t["z"], t["dp"], rows, pool
    ),
    "gram_a": lambda t, rows, pool: gram_a(t["x"], t["h"], t["z"], t["peak"], rows, pool),
    "gram_b": lambda t, rows, pool: gram_b(t["x"], t["h"], rows, pool),
    "matmul": lambda t, rows, pool: matmul(t["wide"], t["up"].t(), t["bias"], rows, pool),
    "matmul_routed": lambda t, rows, pool: matmul_routed(t["wide"], t["down"], t["z"], t["routers"], rows, pool),
    "gelu": lambda t, rows, pool: gelu(t["wide"], t["space"]),
    "gelu_backward": lambda t, rows, pool: gelu_backward(t["wide"], t["space"]),
}


def parse_pool(text: str) -> Pool:
    """``"16/3/1/4"`` under ase gating."""
    experts, k, shared, rank = map(int, text.split("/"))
    return Pool(experts, experts, rank, Gating("ase", k, shared))


def make_tensors(pool: Pool, counts: tuple[int, ...], width: int, like: Tensor) -> Tensors:
    """What every launch reads, random, for an FFN ``width`` wide; ``like`` says the type and the device."""
    tokens, tasks, ranks, hidden = sum(counts), len(counts), pool.ranks, 4 * width
    half = {
        "x": (tokens, width),
        "wide": (tokens, hidden),
        "space": (tokens, hidden + ranks + tasks * pool.columns),
        "h": (tokens, ranks),
        "a": (ranks, width),
        "b": (width, ranks),
        "up": (width, hidden),
        "down": (hidden, width),
        "bias": (width,),
    }
    full = {
        "z": (tokens, pool.columns),
        "dp": (tasks, pool.columns),
        "routers": (tasks, pool.columns, width),
        "peak": (),
    }
    made = {name: torch.randn(shape, device=like.device).to(like.dtype) for name, shape in half.items()}
    return made | {name: torch.randn(shape, device=like.device) for name, shape in full.items()}


class AdaptedFFN:
    """Both passes of an adapted FFN ``width`` wide over made-up tensors; ``like`` says the type and the device.
    ``way`` is one of :data:`kernels.ffn.WAYS`."""

    def __init__(self, pool: Pool, rows: TaskRows, width: int, like: Tensor, way: str) -> None:
        self.setting, self.t = (rows, pool, way), make_tensors(pool, rows.counts, width, like)
        t = self.t
        self.packed = Packed.empty((width, 4 * width, width), (t["a"], t["b"], t["routers"]), like.dtype)
        self.packed.fill_frozen((t["up"].t(), None), (t["down"].t(), None))
        self.packed.fill(t["a"], t["b"], t["routers"])

    def forward(self) -> None:
        _, _, _, h, z, u = ffn_forward(self.t["x"], self.packed, self.t["routers"], *self.setting)
        self.saved = self.t["x"], u, h, z

    def backward(self) -> None:
        """After :meth:`forward`; x stands in for dY."""
        gradients = self.t["x"], self.t["dp"]
        ffn_backward(gradients, self.saved, self.packed, self.t["routers"], *self.setting)
