"""Batch norm over processes, here one process that takes itself for several: PyTorch's numbers."""

import pytest
import torch
from torch import nn

from model import norm


@pytest.mark.parametrize("images", [3, 0])
def test_the_numbers_are_those_of_pytorch(images, monkeypatch):
    """Also where no process has an image of the task: then the running statistics stay."""
    monkeypatch.setattr(norm, "world_size", lambda: 2)
    torch.manual_seed(0)
    x = torch.randn(images, 4, 5, 6, dtype=torch.float64)
    results = []
    for layer in (norm.BatchNorm2d(4).double(), nn.BatchNorm2d(4).double()):
        own = x.clone().requires_grad_()
        y = layer(own)
        y.square().sin().sum().backward()
        results.append([y, own.grad, layer.weight.grad, *layer.buffers()])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
