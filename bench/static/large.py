"""Models the experts of a large pool by both algorithms of kernels/experts: dense, and sorted by expert.

Everything the experts add is counted but for their routers' logits, which PyTorch computes for both. Weights are in the
type of the tokens. A sorted pool is balanced: every expert has equally many pairs of a token and an active expert.
"""

from typing import Any

import torch
from torch import Tensor

from bench.aot import DTYPES, WIDTH, recording
from bench.grouped_launches import Call, make_call
from bench.launches import parse_pool
from bench.static.ffn import Passes, microseconds, trace
from bench.static.model import TARGET
from kernels import Experts
from kernels.experts import custom_ops
from kernels.experts.gates import route, route_backward
from kernels.experts.sort import sort
from kernels.segments import TaskSegments

ALGORITHMS = custom_ops.ALGORITHMS
# By name: the pool as bench.grouped_launches reads it, and the width. The last is FGMoE's decoder: 4 experts with a
# hidden width of 4 x 256, cut into 4 slices each, in a set for each task.
POOLS = {
    "64/12/4/16": ("64/12/4/16", WIDTH),
    "64/12/4/64": ("64/12/4/64", WIDTH),
    "fgmoe 4/2/4/1": ("16/7/1/256 gelu", 256),
}


def passes(name: str, dtype: str, tokens: int, tasks: int, algorithm: str) -> Passes:
    """The launches of the experts, forward and backward, with a base that they are added to."""
    numbers, width = POOLS[name]
    pool, counts = parse_pool(numbers.partition(" ")[0]), (tokens // tasks,) * tasks
    segments = TaskSegments.of(counts, torch.device("cpu"))
    with recording(TARGET):
        call = make_call(numbers, segments, width, torch.empty(0, dtype=DTYPES[dtype], device="meta"))
    z, g = call.g.new_empty(1, len(call.x), pool.columns), call.g[None]
    dp = z.new_empty(1, tasks, pool.columns)

    def forward() -> None:
        route(z, segments, pool)
        if algorithm == "dense":
            custom_ops.dense_forward(call.x, call.rows[None], call.experts, g, segments)
        else:
            custom_ops.grouped_forward(call.x, call.rows[None], call.experts, g, segments, call.slots)

    def backward() -> None:
        dg = _dense_dg(call) if algorithm == "dense" else _grouped_dg(call)
        route_backward(z, g, dg, dp, segments, pool)

    return Passes(trace(forward), trace(backward))


def _dense_dg(call: Call) -> Tensor:
    u = call.x.new_empty(len(call.x), call.experts.down.shape[1])
    return custom_ops.dense_backward(call.rows[None], (call.x, u, call.g[None]), call.experts, call.segments)[1]


def _grouped_dg(call: Call) -> Tensor:
    sort(call.g[None], call.segments, call.slots, call.experts.sets)  # it is not kept, and here has no values
    return custom_ops.grouped_backward(call.rows[None], (call.x, call.hidden, call.g[None]), call.experts, call.order)[
        1
    ]


def row(setting: dict[str, Any], gpu: str, both: dict[str, Passes]) -> dict[str, Any]:
    """Modelled microseconds forward and backward by algorithm, and which one the rule chooses."""
    numbers, width = POOLS[setting["pool"]]
    pool = parse_pool(numbers.partition(" ")[0])
    down, up = torch.empty(1, pool.ranks, width, device="meta"), torch.empty(1, width, pool.ranks, device="meta")
    chosen = custom_ops.choose(Experts(down, up), pool.experts, pool.gating, 1)
    times = {
        name: {way: round(microseconds(getattr(own, way), gpu), 2) for way in ("forward", "backward")}
        for name, own in both.items()
    }
    return setting | {"gpu": gpu, "rule": chosen} | times
