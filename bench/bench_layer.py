"""The adapted FFN beside the frozen one: forward, and forward with backward.

    pytest bench/ --benchmark-only [--kernel=auto|triton|reference]
"""

import pytest
import torch

from fastmoe_lora import MoEConfig, adapt
from kernels import resolve
from model import ViT, ViTConfig

TASKS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (width, tokens): a CPU gets a shape that two cores finish in a moment.
WIDTH, TOKENS, DTYPE = (768, 40_960, torch.bfloat16) if DEVICE.type == "cuda" else (192, 1_970, torch.float32)
CONFIGS = ["frozen", "16/3/1/4", "32/6/2/2", "64/12/4/1", "16/4/0/4"]


def make_ffn(config: str, kernel: str) -> torch.nn.Module:
    """One FFN of a ViT, frozen, with the experts of ``config`` beside it."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(width=WIDTH, depth=1, heads=WIDTH // 64), 32).to(DEVICE, DTYPE).requires_grad_(False)
    if config != "frozen":
        routing = adapt(vit, MoEConfig.parse(config), TASKS, lora_rank=0, kernel=kernel)
        routing.assign([TOKENS // TASKS] * TASKS)
        torch.nn.init.normal_(vit.blocks[0].mlp.lora_B, std=0.02)
    return vit.to(DEVICE).blocks[0].mlp


def synchronised(step):
    """``step`` that returns when the device is done."""

    def run():
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_ffn(benchmark, kernel: str, config: str, backward: bool) -> None:
    benchmark.group = f"FFN, width {WIDTH}, {TOKENS} tokens, {DTYPE}, {DEVICE.type}"
    benchmark.extra_info["kernel"] = resolve(kernel, DEVICE)
    ffn = make_ffn(config, kernel)
    x = torch.randn(TOKENS, WIDTH, device=DEVICE, dtype=DTYPE, requires_grad=backward)

    def step():
        y = ffn(x)
        if backward:
            y.backward(torch.ones_like(y))

    with torch.set_grad_enabled(backward):
        benchmark(synchronised(step))
