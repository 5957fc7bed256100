"""The heads alone, forward and backward: in channels-last as they run, in NCHW, and compiled; ratios from one run.

The paper's head on ViT-B's tokens, 8 images of 224 pixels in bf16, on a GPU; the same head on ViT-Ti's tokens, one
image in fp32, on a CPU. Tokens lie channels-last in memory, and every layer of a head keeps that order.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import measure
from model import HEADS, heads
from model.backbone import FeatureMap, Level, to_grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, IMAGES, HALF = (768, 8, True) if DEVICE.type == "cuda" else (192, 1, False)
GRID = (14, 14)
CHANNELS = 21


def bench_heads(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    head = HEADS["up"]([Level(WIDTH, 16)], CHANNELS).to(DEVICE)
    compiled = torch.compile(head, fullgraph=True, dynamic=False)
    tokens = torch.randn(IMAGES, 1 + GRID[0] * GRID[1], WIDTH, device=DEVICE, requires_grad=True)

    def step(run: Callable[..., Tensor]) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=HALF):
            output = run([FeatureMap(tokens, GRID)])
        output.float().sum().backward()

    def in_nchw() -> None:
        monkeypatch.setattr(heads, "to_grid", lambda *given: to_grid(*given).contiguous())
        step(head)
        monkeypatch.setattr(heads, "to_grid", to_grid)

    steps: dict[str, measure.Step] = {
        "channels-last": lambda: step(head),
        "NCHW": in_nchw,
        "compiled": lambda: step(compiled),
    }
    seconds = measure.paired(steps, float(benchmark._max_time), DEVICE)
    medians = {name: measure.summary(times)["median"] for name, times in seconds.items()}
    benchmark.group = f"heads, {DEVICE.type}"
    benchmark.extra_info |= {
        "suite": "heads",
        "seconds": medians,
        "over_channels_last": {name: median / medians["channels-last"] for name, median in medians.items()},
    }
    benchmark.pedantic(steps["channels-last"], rounds=1)
