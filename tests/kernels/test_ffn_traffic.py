"""How many launches and bytes the adapted FFN costs, counted as in test_traffic.py."""

from collections import Counter
from functools import cache

import pytest
import torch
import triton

from bench.traffic import Traffic, counting
from kernels import Gating, TaskSegments
from kernels.custom_ops import ALGORITHMS, lora_moe

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counts loads and stores in Triton's interpreter: TRITON_INTERPRET=1"
)

HALF, FULL = 2, 4  # bytes of an fp16 and an fp32 element
TASKS, TOKENS = 3, 96
D, F = 384, 768
POOLS = [(16, 3, 1, 4), (32, 6, 2, 2), (64, 12, 4, 1)]  # the paper's (N, k, S, r)
LARGEST = (16, 3, 1, 16)  # R = 256; test_traffic.py measures it in every run
pools = pytest.mark.parametrize(
    "shape", [*POOLS, pytest.param(LARGEST, marks=pytest.mark.long)], ids=lambda shape: "/".join(map(str, shape))
)

PACK, SHRINK, GELU, MATMUL_GELU = "pack_kernel", "route_shrink_kernel", "gelu_kernel", "matmul_gelu_kernel"
GATE, WEIGHT_GRAD, REDUCE = "gate_backward_kernel", "weight_grad_kernel", "reduce_kernel"


@cache
def measure(shape, algorithm="columns", gating="ase", counts=(32,) * TASKS) -> tuple[Traffic, Traffic]:
    """(forward, backward) in fp16 with fp32 adapters, D wide on both sides."""
    experts, k, shared, rank = shape
    rng, tokens, gate = torch.Generator().manual_seed(0), sum(counts), Gating(gating, k, shared)

    def normal(*size: int, dtype=torch.float32) -> torch.Tensor:
        return (0.05 * torch.randn(*size, generator=rng)).to(dtype)

    x, a, b = normal(tokens, D, dtype=torch.float16), normal(experts * rank, D), normal(D, experts * rank)
    routers = normal(TASKS, gate.router_columns(experts), D)
    half = {"dtype": torch.float16}
    linears = (normal(F, D, **half), normal(F, **half)), (normal(D, F, **half), normal(D, **half))
    leaves = [leaf.requires_grad_() for leaf in (x, a, b, routers)]
    dy, dp = torch.ones(tokens, D, dtype=torch.float16), torch.ones(routers.shape[:2])
    segments = TaskSegments.of(tuple(counts), x.device)
    with counting(tokens) as forward:
        y, _, mean_probs = lora_moe(x, linears, (a, b), routers, segments, gate, algorithm=algorithm)
    with counting(tokens) as backward:
        torch.autograd.grad((y, mean_probs), leaves, (dy, dp))
    return forward, backward


def of_pytorch(traffic: Traffic) -> dict[tuple[str, str, str], float]:
    """Bytes per token of PyTorch's own operators on token-sized tensors."""
    return {key: n / TOKENS for key, n in traffic.issued.items() if key[0].startswith("aten.")}


def of_kernels(traffic: Traffic, *names: str) -> float:
    """Distinct bytes per token, on token-sized tensors, of the kernels so called or of all."""
    return sum(
        n / TOKENS for (kernel, *_), n in traffic.distinct.items()
        if not kernel.startswith("aten.") and (not names or kernel.split(" ")[0] in names)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gating", "shape"),
    [*[("ase", shape) for shape in POOLS], pytest.param("ase", LARGEST, marks=pytest.mark.long),
     ("topk", (16, 4, 0, 4)), ("topk-renorm", (16, 4, 0, 4)), ("naive-shared", (16, 3, 1, 4))],
)  # fmt: skip
def test_three_launches_forward_and_six_backward_where_pytorch_makes_the_products(gating, shape):
    """One each way packs the parameters, and GELU's, one each, replace PyTorch's own."""
    forward, backward = measure(shape, gating=gating)
    assert forward.launches == Counter([PACK, SHRINK, GELU])
    assert backward.launches == Counter([PACK, GELU, GATE, WEIGHT_GRAD, WEIGHT_GRAD, REDUCE])
    assert forward.atomics == backward.atomics == 0


def test_fused_launches_a_product_in_the_place_of_gelu():
    forward, backward = measure(POOLS[0], "fused")
    assert forward.launches == Counter([PACK, SHRINK, MATMUL_GELU])
    assert backward.launches == Counter([PACK, MATMUL_GELU, GATE, WEIGHT_GRAD, WEIGHT_GRAD, REDUCE])
    assert forward.atomics == backward.atomics == 0


@pools
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_pytorch_makes_the_products_and_touches_no_token_besides(algorithm, shape):
    """Two forward and two backward, as the frozen FFN alone, but with LoRA's columns; no copy, cast, cat or add."""
    ranks, columns = shape[0] * shape[3], TASKS * shape[0]
    products = {  # columns of the operand and of the result; the others of fused are ours
        "columns": ((D, F), (F + ranks, D), (D, F + ranks), (F + ranks + columns, D)),
        "fused": (None, (F + ranks, D), None, (F + ranks + columns, D)),
    }[algorithm]
    expected = [Counter(), Counter()]  # bytes per token
    names = ("aten.addmm.default",) * 2 + ("aten.mm.out", "aten.mm.default")
    for half, name, shapes in zip((0, 0, 1, 1), names, products, strict=True):
        for width, what in zip(shapes or (), ("read", "written"), strict=False):
            expected[half][name, f"{TOKENS}x{width}", what] += width * HALF
    assert [Counter(of_pytorch(half)) for half in measure(shape, algorithm)] == expected


@pools
def test_gelu_moves_u_and_its_own_result_and_no_more(shape):
    forward, backward = measure(shape)
    assert of_kernels(forward, GELU) == 2 * F * HALF  # u -> a
    assert of_kernels(backward, GELU) == 3 * F * HALF  # u, da -> du


@pools
def test_fused_moves_operands_and_results_once_and_saves_one_pass_over_f_forward_and_two_backward(shape):
    ranks = shape[0] * shape[3]
    fused, columns = measure(shape, "fused"), measure(shape)
    assert of_kernels(fused[0], MATMUL_GELU) == (D + 2 * F) * HALF  # x -> u, a
    assert of_kernels(fused[1], MATMUL_GELU) == (D + F + F + ranks) * HALF  # dY, u -> du, dH'
    for passes, own, other in zip((1, 2), fused, columns, strict=True):
        moved = [of_kernels(half) + sum(of_pytorch(half).values()) for half in (own, other)]
        assert moved[1] - moved[0] == passes * F * HALF


@pools
def test_packing_reads_and_writes_every_parameter_once(shape):
    """In fp16 the forward pass packs W2, B, A and two parts of the routers, the backward pass all weights once."""
    ranks, columns = shape[0] * shape[3], TASKS * shape[0]
    frozen, adapters = D * F, 2 * D * ranks
    halves = [{key[1:]: n for key, n in half.others.items() if key[0] == PACK} for half in measure(shape)]
    for half, weights, parts in zip(halves, (1, 2), (2, 1), strict=True):
        moved = {what: sum(n for (name, way), n in half.items() if way == what and name != "scales")
                 for what in ("read", "written")}  # fmt: skip
        assert moved["read"] == weights * frozen * HALF + (adapters + columns * D) * FULL
        assert moved["written"] == (weights * frozen + adapters + parts * columns * D) * HALF


@pools
def test_memory_sees_the_compulsory_bytes_and_what_is_known_besides(shape):
    """Every pass reads what it needs and writes what the next one needs, once."""
    experts, ranks = shape[0], shape[0] * shape[3]
    wide, rank, gates, spread = D * HALF, ranks * HALF, experts * FULL, TASKS * experts * HALF
    shrink = wide + 2 * rank + gates  # x -> H, H', g (or z)
    gate_backward = 2 * rank + gates + rank + gates + spread  # dH', H, g (or z) -> dH, dz, dz in columns
    weight_grads = wide + rank + wide + rank + gates  # dY, H'; x, dH, dz
    gelu = 5 * F * HALF
    compulsory = shrink + gate_backward + weight_grads + gelu
    # z beside g, which statistics look at; H' anew, since only H is kept between the passes.
    besides = gates + rank
    measured = sum(of_kernels(half) for half in measure(shape))
    assert measured == compulsory + besides, "\n".join(map(str, measure(shape)))
    assert measured <= 1.05 * compulsory


@pools
def test_no_byte_is_moved_twice_in_a_launch_but_rank_space_once_per_column_tile_of_weight_grad(shape):
    for half in measure(shape):
        for key, issued in half.issued.items():
            kernel, name, _ = key
            times = half.grids[kernel][0] if kernel.startswith("weight_grad") and name in ("narrow", "dz") else 1
            assert issued == times * half.distinct[key], f"{key}\n{half}"


@pytest.mark.parametrize("counts", [(50, 0, 46), (0, 0, 96)])
def test_bytes_do_not_depend_on_how_tokens_divide_among_tasks(counts):
    equal, unequal = measure(POOLS[0]), measure(POOLS[0], counts=counts)
    assert [half.issued for half in unequal] == [half.issued for half in equal]
