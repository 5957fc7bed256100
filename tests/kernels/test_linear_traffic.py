"""How many launches and bytes the adapted linear layer costs, counted as in test_traffic.py."""

from collections import Counter
from functools import cache

import pytest
import torch
import triton

from bench.traffic import Traffic, counting
from kernels import Gating, TaskSegments
from kernels.custom_ops import lora_moe

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counts loads and stores in Triton's interpreter: TRITON_INTERPRET=1"
)

HALF, FULL = 2, 4  # bytes of an fp16 and an fp32 element
TASKS, TOKENS = 3, 96
D_IN, D_OUT = 192, 768
POOLS = [(16, 3, 1, 4), (32, 6, 2, 2), (64, 12, 4, 1)]  # the paper's (N, k, S, r)
LARGEST = (16, 3, 1, 16)  # R = 256; test_traffic.py measures it in every run
pools = pytest.mark.parametrize(
    "shape", [*POOLS, pytest.param(LARGEST, marks=pytest.mark.long)], ids=lambda shape: "/".join(map(str, shape))
)


@cache
def measure(shape, counts=(32,) * TASKS) -> tuple[Traffic, Traffic]:
    """(forward, backward) in fp16 with fp32 adapters."""
    experts, k, shared, rank = shape
    rng, tokens, gate = torch.Generator().manual_seed(0), sum(counts), Gating("ase", k, shared)

    def normal(*size: int) -> torch.Tensor:
        return 0.05 * torch.randn(*size, generator=rng)

    a, b, routers = normal(experts * rank, D_IN), normal(D_OUT, experts * rank), normal(TASKS, experts, D_IN)
    linear = normal(D_OUT, D_IN).half(), normal(D_OUT).half()
    x, a, b, routers = leaves = [leaf.requires_grad_() for leaf in (normal(tokens, D_IN).half(), a, b, routers)]
    segments, cotangents = TaskSegments.of(counts, x.device), (normal(tokens, D_OUT).half(), torch.ones(TASKS, experts))
    with counting(tokens) as forward:
        y, _, mean_probs = lora_moe(x, (linear,), (a, b), routers, segments, gate)
    with counting(tokens) as backward:
        torch.autograd.grad((y, mean_probs), leaves, cotangents)
    return forward, backward


def of_pytorch(traffic: Traffic) -> Counter:
    """Bytes per token of PyTorch's own operators on token-sized tensors."""
    return Counter({key: n / TOKENS for key, n in traffic.issued.items() if key[0].startswith("aten.")})


@pools
def test_two_launches_forward_and_five_backward(shape):
    """One each way packs the parameters."""
    forward, backward = measure(shape)
    assert forward.launches == Counter(["pack_kernel", "route_shrink_kernel"])
    assert backward.launches == Counter(
        ["pack_kernel", "gate_backward_kernel", "weight_grad_kernel", "weight_grad_kernel", "reduce_kernel"]
    )
    assert forward.atomics == backward.atomics == 0


@pools
def test_pytorch_copies_x_makes_three_products_and_touches_no_token_besides(shape):
    """One product forward, as the frozen layer alone, but with LoRA's columns; backward that product, and dx_0 plus the
    experts' part. No cast, cat or add, and no y."""
    ranks, logits = shape[0] * shape[3], TASKS * shape[0]
    columns = D_IN + ranks
    forward, backward = measure(shape)
    made = {"aten.copy_.default": (D_IN, D_IN), "aten.addmm.default": (columns, D_OUT)}
    assert of_pytorch(forward) == Counter({
        (name, f"{TOKENS}x{width}", what): width * HALF
        for name, widths in made.items() for width, what in zip(widths, ("read", "written"), strict=True)
    })  # fmt: skip
    moved = [("mm.out", D_OUT, "read"), ("mm.out", columns, "written"), ("addmm.default", D_IN, "read"),
             ("addmm.default", ranks + logits, "read"), ("addmm.default", D_IN, "written")]  # fmt: skip
    expected = Counter()
    for name, width, what in moved:
        expected[f"aten.{name}", f"{TOKENS}x{width}", what] += width * HALF
    assert of_pytorch(backward) == expected


@pools
def test_memory_sees_the_compulsory_bytes_and_what_is_known_besides(shape):
    """Every pass reads what it needs and writes what the next one needs, once; weight_grad_b alone reads D columns."""
    experts, ranks = shape[0], shape[0] * shape[3]
    narrow, wide, rank, gates = D_IN * HALF, D_OUT * HALF, ranks * HALF, experts * FULL
    spread = TASKS * experts * HALF
    shrink = narrow + 2 * rank + 2 * gates  # x -> H, H', z, g
    gate_backward = 2 * rank + gates + 2 * rank + gates + spread  # dH', H, z -> dH, H', dz, dz in columns
    weight_grads = wide + rank + narrow + rank + gates  # dY, H'; x, dH, dz
    seen = [
        sum(n / TOKENS for (kernel, *_), n in half.distinct.items() if not kernel.startswith("aten."))
        for half in measure(shape)
    ]
    assert seen == [shrink, gate_backward + weight_grads], "\n".join(map(str, measure(shape)))


@pytest.mark.parametrize("counts", [(50, 0, 46), (0, 0, 96)])
def test_bytes_do_not_depend_on_how_tokens_divide_among_tasks(counts):
    assert [half.issued for half in measure(POOLS[0], counts)] == [half.issued for half in measure(POOLS[0])]
