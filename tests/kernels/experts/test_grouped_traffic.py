"""Bytes and launches of the grouped path, counted in the interpreter beside those that the algorithm cannot avoid.

The rows of the problems select experts in turn, so that every block is full. Numbers are the slope between two batches:
weights, partial sums and what does not grow with the tokens drop out.
"""

from functools import cache

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from bench.traffic import Traffic, counting  # noqa: E402
from kernels import Experts, TaskSegments  # noqa: E402
from kernels.experts.custom_ops import grouped_backward, grouped_forward  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counts in the interpreter")

EXPERTS, SLOTS, ES = 4, 2, 2
FEW, MANY = 128, 256  # tokens: one block for each expert, and two
RANKS = pytest.mark.parametrize(("rank", "width"), [(16, 768), (256, 256)])


@cache
def measure(tokens: int, rank: int, width: int, gates: int = 1) -> tuple[Traffic, Traffic]:
    """(forward, backward) in fp16 with ``width`` columns on both sides."""
    rows, half = gates * tokens, torch.float16
    ranks = EXPERTS * rank
    experts = Experts(torch.ones(1, ranks, width, dtype=half), torch.ones(1, width, ranks, dtype=half))
    in_turn = (SLOTS * torch.arange(rows)[:, None] + torch.arange(SLOTS)) % EXPERTS
    selected = torch.zeros(rows, EXPERTS, dtype=torch.bool).scatter_(1, in_turn, True)
    x, dy = torch.full((tokens, width), 0.01, dtype=half), torch.full((gates, tokens, width), 0.01, dtype=half)
    g = selected.float().unflatten(0, (gates, tokens))
    segments = TaskSegments.of((tokens,), x.device)
    with counting(rows) as forward:
        _, u, order = grouped_forward(x, dy, experts, g, segments, SLOTS)
    with counting(rows) as backward:
        grouped_backward(dy, (x, u, g), experts, order)
    return forward, backward


def slope(count, rank: int, width: int) -> float:
    """Per token, of both passes."""
    few, many = (sum(count(half) for half in measure(tokens, rank, width)) for tokens in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def compulsory(rank: int, width: int) -> int:
    """Bytes per token that this algorithm cannot avoid, if a gathered row is read from memory once per launch."""
    row, hidden, pairs = width * ES, SLOTS * rank * ES, SLOTS * width * ES
    forward = (row + 2 * hidden) + (hidden + pairs) + (pairs + row + row)  # x -> U, H'; -> O; O, base -> y
    backward = row + hidden + 2 * hidden  # dY, U -> dU, H'
    weight_grads = (row + hidden) + (row + hidden)  # dY, H' -> dB; x, dU -> dA
    return forward + backward + weight_grads + (hidden + pairs) + (pairs + row)  # dU -> O -> dx


@RANKS
def test_memory_sees_at_most_8_percent_more_than_the_compulsory_bytes(rank, width):
    """The rest is integers and gates, 4 (8 K + 8 N) bytes a token at most: at K = 2 and width 256 the most."""
    ratio = slope(lambda half: half.everything, rank, width) / compulsory(rank, width)
    assert 1 <= ratio <= 1.08, ratio


@pytest.mark.parametrize(("rank", "width", "rank_tiles", "column_tiles"), [(16, 768, 1, 6), (256, 256, 2, 2)])
def test_programs_read_pairs_once_for_every_tile(rank, width, rank_tiles, column_tiles):
    """What programs issue: a gathered row once per pair and tile of ranks, hidden rows once per tile of columns."""
    wide, narrow = SLOTS * width * ES, SLOTS * rank * ES
    backward_tiles = -(-rank // 64)  # shrink's backward tiles are narrower
    expected = {
        ("shrink_kernel", "tokens", "read"): (rank_tiles + backward_tiles) * wide,
        ("shrink_kernel", "u", "written"): narrow,
        ("shrink_kernel", "u", "read"): narrow,
        ("shrink_kernel", "gated", "written"): 2 * narrow,
        ("shrink_kernel", "du", "written"): narrow,
        ("expand_kernel", "hidden", "read"): 2 * column_tiles * narrow,
        ("expand_kernel", "out", "written"): 2 * wide,
        ("combine_kernel", "out", "read"): 2 * wide,
        ("combine_kernel", "base", "read"): width * ES,
        ("combine_kernel", "y", "written"): 2 * width * ES,
        ("weight_grad_kernel", "wide", "read"): rank_tiles * wide,
        ("weight_grad_kernel", "narrow", "read"): column_tiles * narrow,
        ("weight_grad_kernel #2", "wide", "read"): rank_tiles * wide,
        ("weight_grad_kernel #2", "narrow", "read"): column_tiles * narrow,
    }
    for key, per_token in expected.items():
        assert slope(lambda half, key=key: half.issued[key] + half.others[key], rank, width) == per_token, key


def test_four_launches_sort_three_compute_and_five_go_back_without_atomics():
    forward, backward = measure(FEW, 16, 768)
    assert forward.launches == dict.fromkeys(
        ("count_kernel", "prefix_kernel", "scatter_kernel", "shrink_kernel", "expand_kernel", "combine_kernel"), 1
    )
    assert forward.operators == {"aten.fill_.Scalar": 1}
    assert sum(backward.launches.values()) == 5
    assert forward.atomics == backward.atomics == 0


def test_pytorch_itself_touches_no_token():
    """But for the gates' gradient, which starts as 0."""
    for half in measure(FEW, 16, 768):
        moved = {(name, shape) for name, shape, _ in half.issued if name.startswith("aten.")}
        assert moved <= {("aten.zeros_like.default", f"{FEW}x{EXPERTS}")}


def test_products_grow_with_the_selected_experts_and_not_with_the_pool():
    flops = slope(lambda half: half.flops, 256, 256)
    assert flops == 6 * 2 * SLOTS * 256 * 256  # U, O, dH', dB, dA and dx
