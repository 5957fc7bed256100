"""How many bytes the dense algorithm moves per token, counted in Triton's interpreter beside the compulsory ones.

Every tensor is counted: the bytes of a run over more tokens less those of a run over fewer, so that weights cancel out.
"""

import pytest
import torch
import triton

from bench.traffic import Traffic, counting

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counts loads and stores in Triton's interpreter: TRITON_INTERPRET=1"
)

HALF, FULL = 2, 4  # bytes of an element
GEMMS = {"aten.mm.out", "aten.mm.default", "aten.addmm.out"}
WIDTHS = 48, 40
CASES = [
    {"experts": 64, "rank": 16, "biases": "", "activation": "none"},  # a pool of LoRA
    {"experts": 16, "rank": 24},  # slices of an MLP
    {"experts": 16, "rank": 8, "readers": 3},
]


def measure(mixture) -> tuple[Traffic, Traffic]:
    mixture, tokens = mixture.to(torch.float16), sum(mixture.counts)
    cotangents = mixture.cotangents()
    with counting(tokens) as forward:
        y, _, p = mixture.run("triton", "dense")
    with counting(tokens) as backward:
        torch.autograd.grad((y, p), list(mixture.leaves.values()), cotangents)
    return forward, backward


def compulsory(case) -> int:
    """Bytes per token of every pass that reads what it needs and writes what the next one needs, once."""
    experts, readers, biases = case["experts"], case.get("readers", 1), case.get("biases", "bc")
    d, width = (n * HALF for n in WIDTHS)
    u, gates = experts * case["rank"] * HALF, readers * experts * FULL
    gated = readers * (u + experts * HALF * bool(biases))
    y = readers * width
    forward = [
        gates + gates,  # route: z -> g
        d + u,  # x -> U
        u + gates + gated,  # gate: U, g -> H'
        gated + y + y,  # base, H' -> y
    ]
    backward = [
        y + gated,  # dy -> dH'
        u + gates + gated + u + gates + gated,  # gate_backward: U, g, dH' -> dU, dg, H'
        4 * gates,  # route_backward: z, g, dg -> dz
        y + gated,  # dy, H' -> dB
        u + d,  # dU, x -> dA
        u * bool(biases),  # dU -> db
        u + d,  # dU -> dx
    ]
    return sum(forward + backward)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pass_reads_and_writes_its_tensors_once(case, make_mixture):
    """The partial sums of P, 4C bytes per block of tokens, come on top of the compulsory bytes."""
    few, many = 64, 128
    total = [
        sum(half.everything for half in measure(make_mixture("topk", counts=(tokens,), widths=WIDTHS, **case)))
        for tokens in (few, many)
    ]
    ratio = (total[1] - total[0]) / (many - few) / compulsory(case)
    assert 1 <= ratio <= 1.01


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_launches_in_each_direction_no_atomics_and_no_copies_of_tokens(case, make_mixture):
    forward, backward = measure(make_mixture("topk", counts=(64,), widths=WIDTHS, **case))
    assert forward.launches == {"route_kernel": 1, "gate_kernel": 1}
    assert backward.launches == {"gate_kernel": 1, "route_backward_kernel": 1}
    for half in (forward, backward):
        touched = {name for name, *_ in half.issued if name.startswith("aten.")}
        assert half.atomics == 0 and touched <= GEMMS | {"aten.sum.dim_IntList"}, half
