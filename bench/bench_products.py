"""The products that our kernels compute, beside cuBLAS on the same operands without our epilogues.

pytest bench/bench_products.py --benchmark-only [--benchmark-json FILE]
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from bench import measure  # noqa: E402
from bench.launches import LAUNCHES, Tensors, make_tensors, parse_pool  # noqa: E402
from kernels.segments import TaskSegments  # noqa: E402

DEVICE = torch.device("cuda")
WIDTH, TASKS, POOL = 768, 5, "16/3/1/4"
# By launch, without GELU.
CUBLAS: dict[str, Callable[[Tensors], Tensor]] = {
    "matmul_gelu": lambda t: F.linear(t["x"], t["w1"], t["b1"]),
    "matmul_gelu_backward": lambda t: torch.mm(t["x"], t["up"]),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the interpreter's time says nothing about a product")
@pytest.mark.parametrize("tokens", [7_880, 40_960])
@pytest.mark.parametrize("launch", CUBLAS)
def bench_product(benchmark: BenchmarkFixture, launch: str, tokens: int) -> None:
    pool, counts = parse_pool(POOL), (tokens // TASKS,) * TASKS
    t = make_tensors(pool, counts, WIDTH, torch.empty(0, dtype=torch.bfloat16, device=DEVICE))
    segments = TaskSegments.of(counts, DEVICE)
    steps = {"subject": lambda: LAUNCHES[launch](t, segments, pool), "cublas": lambda: CUBLAS[launch](t)}
    times = measure.paired(steps, float(benchmark._max_time) / 4, DEVICE)
    seconds = {name: measure.summary(taken) for name, taken in times.items()}
    taken, cublas = seconds["subject"]["median"], seconds["cublas"]["median"]
    product = CUBLAS[launch](t)
    benchmark.group = f"product, {tokens} tokens"
    benchmark.extra_info |= {
        "suite": "product",
        "subject": launch,
        "tokens": tokens,
        "seconds": seconds,
        "of_cublas": cublas / taken,
        "flops_per_second": 2 * product.numel() * WIDTH / taken,
    }
    benchmark.pedantic(steps["subject"], rounds=3)
