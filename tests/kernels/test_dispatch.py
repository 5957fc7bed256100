"""The operation as users call it, with the implementation that ``pytest --kernel`` chose."""

import pytest
import torch

from kernels import Gating, TaskSegments, lora_moe, reference, resolve_kernel

GATES = [Gating("ase", 3, 1), Gating("topk", 4, 0), Gating("topk-renorm", 4, 0), Gating("naive-shared", 3, 1)]


@pytest.mark.parametrize("gating", GATES, ids=lambda gating: gating.name)
def test_the_chosen_kernel_computes_the_paper_in_fp32(kernel, gating):
    """Forward and every gradient against the reference in fp64; 2e-6 is some tens of fp32 roundings."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segments = TaskSegments.of((9, 0, 24), device)
    shapes = (33, 40), (33, 24), (64, 40), (24, 64), (3, gating.router_columns(16), 40)
    exact = [torch.randn(shape, device=device).double().requires_grad_() for shape in shapes]
    rounded = [tensor.detach().float().requires_grad_() for tensor in exact]
    for (x, base, a, b, routers), operation in (
        (exact, reference.lora_moe),
        (rounded, lambda *arguments: lora_moe(*arguments, kernel)),
    ):
        y, _, p = operation(x, base, (a, b), routers, segments, gating)
        (y.square().mean() + p.square().sum()).backward()
    for ours, truth in zip(rounded, exact, strict=True):
        assert (ours.grad - truth.grad).norm() <= 2e-6 * truth.grad.norm()


def test_auto_is_triton_on_a_gpu_and_the_reference_elsewhere():
    assert resolve_kernel("auto", torch.device("cpu")) == "reference"
    if torch.cuda.is_available():
        assert resolve_kernel("auto", torch.device("cuda")) == "triton"
