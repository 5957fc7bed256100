"""A lower bound of the adapted FFN's time, from the bytes and operations that it cannot avoid and measured ceilings.

The bound is the measured time of the frozen FFN plus that of the experts. At site ffn, with d = D and es bytes per
element, these add

    forward     route_shrink    T (d es + 2R es + 4C + 4N) bytes
                wider fc2       2 T R D operations
    backward    dH', dx         2 T R D + 2 T (R + tasks C) d operations
                gate_backward   T (3R es + 8C) bytes
                weight_grad     T (D es + R es) + T (d es + R es + 4C) bytes

The other symbols are those of kernels/reference.py.
"""

from bench.layers import TASKS, Shape
from fastmoe_lora import MoEConfig


def added(shape: Shape, backward: bool) -> tuple[int, int]:
    """(bytes, operations) of the experts alone."""
    config = MoEConfig.parse(shape.config)
    es, d, tokens, experts = shape.dtype.itemsize, shape.width, shape.tokens, config.experts
    ranks, columns = experts * config.rank, config.gating.router_columns(experts)
    moved = d * es + 2 * ranks * es + 4 * columns + 4 * experts
    multiplied = 2 * ranks * d
    if backward:
        moved += 3 * ranks * es + 8 * columns + 2 * (d + ranks) * es + 4 * columns
        multiplied += 2 * ranks * d + 2 * (ranks + TASKS * columns) * d
    return tokens * moved, tokens * multiplied


def work(shape: Shape, backward: bool) -> tuple[int, int]:
    """(bytes, operations) of the whole adapted FFN; frozen weights need no gradients."""
    d, hidden = shape.width, 4 * shape.width
    moved, multiplied = 2 * d + 4 * hidden, 4 * d * hidden  # x, u, u, a, a, y; a token passes both products
    if backward:
        moved, multiplied = moved + 2 * d + 5 * hidden, 2 * multiplied  # dy, da, da, u, du, du, dx
    extra = added(shape, backward)
    return shape.tokens * moved * shape.dtype.itemsize + extra[0], shape.tokens * multiplied + extra[1]


def floor_seconds(shape: Shape, backward: bool, frozen: float, ceilings: dict[str, float]) -> float:
    """Least seconds of the adapted FFN if the frozen FFN takes ``frozen`` seconds."""
    moved, multiplied = added(shape, backward)
    return frozen + moved / ceilings["bytes_per_second"] + multiplied / ceilings["flops_per_second"]
