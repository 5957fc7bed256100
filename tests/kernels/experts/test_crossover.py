"""Dense or grouped, by the model of the crossover."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels import Experts, Gating  # noqa: E402
from kernels.experts.custom_ops import choose, crossover  # noqa: E402


def is_grouped(ranks, d, width, slots, rank, gates=1):
    """Whether a pool of R = ``ranks`` is computed by the grouped algorithm."""
    down, up = torch.empty(1, ranks, d, device="meta"), torch.empty(1, width, ranks, device="meta")
    return choose(Experts(down, up), ranks // rank, Gating("topk", slots, 0), gates) == "grouped"


def times(ranks, d, width, slots, rank, gates):
    """(dense, grouped) seconds per token of the model in the docstring, on an H200."""
    flops, bandwidth, es = 790e12, 790e12 / 184, 2
    dense = 2 * ranks * (d + gates * width) / flops
    moved = gates * es * (slots * d + (2 * slots + 2) * width) / bandwidth
    return dense, moved + gates * 2 * slots * rank * (d + width) / flops


@pytest.mark.parametrize("gates", [1, 5])
@pytest.mark.parametrize(("d", "width", "slots", "rank"), [(768, 768, 16, 16), (384, 1536, 4, 64), (192, 192, 3, 256)])
def test_both_take_the_same_time_at_the_crossover(d, width, slots, rank, gates):
    at = crossover(d, width, slots, rank, gates)
    dense, grouped = times(at, d, width, slots, rank, gates)
    assert dense == pytest.approx(grouped, rel=1e-12)
    experts = int(at) // rank
    assert is_grouped((experts + 1) * rank, d, width, slots, rank, gates)
    assert not is_grouped(experts * rank, d, width, slots, rank, gates)


def test_a_pool_whose_experts_are_all_selected_is_dense():
    """The sorted path then computes as much and moves more, whatever the width."""
    for experts in (4, 64, 4096):
        assert not is_grouped(experts * 256, 768, 768, experts, 256)


def test_few_of_many_experts_are_grouped():
    assert is_grouped(1024 * 16, 768, 768, 8, 16)
    assert not is_grouped(16 * 4, 768, 768, 4, 4)
