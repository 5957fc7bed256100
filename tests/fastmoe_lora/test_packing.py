"""The fused kernels read copies of the parameters: whatever changes those, the next pass sees it.

Versions of tensors do not tell: fused optimisers and changes by way of ``.data`` leave them as they are.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastmoe_lora import MoEConfig, Packing, adapt, packing
from model import ViT, ViTConfig

IMAGES, WIDTH = [2, 1], 16
OPTIMISERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), "foreach": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
}  # fmt: skip


@pytest.fixture
def twins(kernel_triton):
    """(layer that runs the kernels, the same that runs the reference), with x (tokens, WIDTH)."""

    def build(kernel):
        torch.manual_seed(0)
        vit = ViT(ViTConfig(width=WIDTH, depth=1, heads=1, patch=8), 16)
        routing = adapt(vit, MoEConfig(4, 1, 1, 2), len(IMAGES), kernel=kernel)
        nn.init.normal_(vit.blocks[0].mlp.lora_B)
        routing.assign(IMAGES)
        return vit.blocks[0].mlp

    return build("triton"), build("reference")


@pytest.fixture
def kernel_triton():
    triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    if not (triton.knobs.runtime.interpret or torch.cuda.is_available()):
        pytest.skip("Triton runs on a GPU or in its interpreter")


@pytest.fixture
def x():
    return torch.randn(sum(IMAGES) * 5, WIDTH, generator=torch.Generator().manual_seed(1))


def trainable(layer):
    return [layer.lora_A, layer.lora_B, layer.routers]


def assert_same(twins, x):
    """Relative to the experts' own part of y, which is what may be stale."""
    ours, right = (layer(x) for layer in twins)
    part = right - twins[1].base(x)
    assert twins[0].fused and (ours - right).norm() <= 1e-5 * part.norm()


@pytest.mark.parametrize("packed", [True, False], ids=["packed each step", "never packed"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_of_every_optimiser_are_seen(twins, x, name, packed):
    optimisers = [OPTIMISERS[name](trainable(layer)) for layer in twins]
    for _ in range(3):
        for layer, optimiser in zip(twins, optimisers, strict=True):
            if packed:
                Packing(layer).pack()
            optimiser.zero_grad()
            layer(x).square().sum().backward()
            optimiser.step()
        for layer in twins:  # not equal to rounding after a step of Adam, which divides by small numbers
            for parameter, right in zip(trainable(layer), trainable(twins[1]), strict=True):
                parameter.data.copy_(right.data)
        assert_same(twins, x)


def test_changes_by_way_of_data_are_seen(twins, x):
    assert_same(twins, x)
    for layer in twins:
        layer.lora_B.data.mul_(3)
        layer.routers.data.neg_()
    assert_same(twins, x)


def test_a_state_loaded_after_packing_is_seen(twins, x):
    state = {name: 2 * value for name, value in twins[1].state_dict().items()}
    for layer in twins:
        Packing(layer).pack()
        layer.load_state_dict(state)
    assert_same(twins, x)


def test_two_passes_may_wait_for_one_backward(twins, x):
    """Weight sharing, or the accumulation of losses: the second pass packs anew, which changes nothing."""
    gradients = []
    for layer in twins:
        loss = layer(x).square().sum() + layer(2 * x).square().sum()
        gradients.append(torch.autograd.grad(loss, trainable(layer)))
    for ours, right in zip(*gradients, strict=True):
        assert (ours - right).norm() <= 1e-5 * right.norm()


def test_a_checkpointed_pass_packs_again_within_backward(twins, x):
    gradients = []
    for layer in twins:
        y = checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False)
        gradients.append(torch.autograd.grad(y.square().sum(), trainable(layer)))
    for ours, right in zip(*gradients, strict=True):
        assert (ours - right).norm() <= 1e-5 * right.norm()


def test_a_pass_after_packing_copies_nothing(twins, x, monkeypatch):
    layer, copied, fill_all = twins[0], [], packing.fill_all
    monkeypatch.setattr(packing, "fill_all", lambda *args: (copied.append(args), fill_all(*args)))
    Packing(layer).pack()
    layer(x)
    assert len(copied) == 1
    layer(x)  # an eager pass that nobody packed for copies
    assert len(copied) == 2
