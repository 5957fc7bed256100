"""With ``deterministic`` a token's bits in the forward pass depend on nothing else in the batch.

Our kernels alone: the interpreter's products and the frozen ones, which are cuBLAS's on a GPU and may change with the
number of tokens, are made by loops that treat every row alike.
"""

import os
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels import Gating, TaskSegments, custom_ops, tiles  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU's frozen products are cuBLAS's")

TASKS, D, F, POOL = 3, 24, 48, (8, 3, 1, 4)
CPU = torch.device("cpu")
SITES = ["ffn columns", "ffn fused", "linear", "beside"]
# Tokens of each task that stand before the judged ones and behind them: other sizes, blocks and shares of the tasks.
SURROUNDINGS = [((0, 0, 0), (0, 0, 0)), ((1, 0, 130), (0, 7, 0)), ((40, 64, 3), (90, 1, 1)), ((0, 200, 0), (0, 0, 31))]


def product(a, b, dtype):
    return np.einsum("ik,kj->ij", a.astype(dtype), b.astype(dtype))


def fixed_linear(x, weight, bias=None):
    """x W^T + b with the same loop for every row."""
    y = torch.from_numpy(product(x.numpy(), weight.t().numpy(), np.float32))
    return (y if bias is None else y + bias.float()).to(x.dtype)


@pytest.fixture
def rows_alike(monkeypatch):
    monkeypatch.setattr(np, "matmul", product)
    monkeypatch.setattr(custom_ops.F, "linear", fixed_linear)


def normal(*size, seed, dtype):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forward(site, x, counts, dtype):
    """(y, g) of the tokens, under the same weights in every call."""
    experts, k, shared, rank = POOL
    gating, segments = Gating("ase", k, shared), TaskSegments.of(tuple(counts), CPU)
    a, b = normal(experts * rank, D, seed=1, dtype=dtype), normal(D, experts * rank, seed=2, dtype=dtype)
    routers = normal(TASKS, experts, D, seed=3, dtype=torch.float32)
    if site == "beside":
        return custom_ops.lora_moe(x, x, (a, b), routers, segments, gating)[:2]
    widths = (D, D) if site == "linear" else (D, F, D)
    linears = tuple((normal(n, m, seed=4, dtype=dtype), normal(n, seed=5, dtype=dtype)) for m, n in pairwise(widths))
    algorithm = site.removeprefix("ffn ") if site != "linear" else ""
    return custom_ops.lora_moe(x, linears, (a, b), routers, segments, gating, True, algorithm)[:2]


@pytest.mark.usefixtures("rows_alike")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_token_has_the_same_bits_in_every_batch(site, dtype):
    judged = [normal(n, D, seed=10 + n, dtype=dtype) for n in (5, 2, 3)]  # of each task
    found = []
    for before, behind in SURROUNDINGS:
        runs = [
            torch.cat([normal(n, D, seed=20, dtype=dtype), tokens, normal(m, D, seed=30, dtype=dtype)])
            for n, tokens, m in zip(before, judged, behind, strict=True)
        ]
        counts = [len(run) for run in runs]
        results = []
        for matrix in forward(site, torch.cat(runs), counts, dtype):
            parts = zip(matrix.split(counts), before, judged, strict=True)
            results.append(torch.cat([part[n : n + len(tokens)] for part, n, tokens in parts]))
        found.append(results)
    for results in found[1:]:
        for actual, alone in zip(results, found[0], strict=True):
            assert torch.equal(actual, alone)


def test_the_algorithm_and_the_tiles_do_not_depend_on_the_number_of_tokens(monkeypatch):
    monkeypatch.setitem(tiles.TABLES["default"], "ffn", {"small": "fused", "large": "columns"})
    parse = partial(custom_ops._parse.__wrapped__, ranks=64, columns=16, device=CPU, dtype=torch.float32)
    assert [parse("ase/3/1/", large=large)[1] for large in (False, True)] == ["fused", "columns"]
    assert [parse("ase/3/1/deterministic", large=large)[1] for large in (False, True)] == ["columns", "columns"]
