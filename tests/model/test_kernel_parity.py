"""The whole multi-task model under both kernels: predictions, losses and every gradient of the published widths."""

import copy
import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from fastmoe_lora import MoEConfig, adapt  # noqa: E402
from fastmoe_lora.layers import frozen_weights
from kernels.dispatch import choose_family, known_family  # noqa: E402
from model import VITS, MultiTaskViT, ViT  # noqa: E402

CHANNELS = {"seg": 21, "parts": 7, "sal": 2, "normals": 3, "edge": 1}
SIZES = {
    "ViT-Ti, three blocks": replace(VITS["vit_tiny"], depth=3), "ViT-B, one block": replace(VITS["vit_base"], depth=1),
}  # fmt: skip
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Norm of the difference over the norm: fp32 sums of up to 3,072 products in different orders, a dozen in sequence.
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    known_family.cache_clear()  # another test may have asked without the interpreter


def make(config):
    torch.manual_seed(0)
    vit = ViT(config, 32)
    routing = adapt(vit, MoEConfig.parse("16/3/1/4"), len(CHANNELS), lora_rank=4, kernel="triton")
    model = MultiTaskViT(vit, CHANNELS, "light", routing)
    with torch.no_grad():  # as trained: B nonzero, routers that tell experts apart
        for name, parameter in vit.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
            elif name.endswith("routers"):
                parameter.normal_(std=config.width**-0.5)
    return model.to(DEVICE)


def results(model, images, index):
    """Predictions, the mutual-information loss, and the gradients of random cotangents: those of means may cancel."""
    predictions = model(images, index)
    rng, loss = torch.Generator().manual_seed(1), model.routing.mi_loss()
    outputs = [*predictions.values(), loss]
    cotangents = [torch.randn(p.shape, generator=rng).to(DEVICE) for p in predictions.values()]
    cotangents.append(torch.full_like(loss, 10))
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    return {**{task: p.detach() for task, p in predictions.items()}, "loss": loss.detach(),
            **dict(zip(wanted, gradients, strict=True))}  # fmt: skip


def fused(model):
    """Whether base and experts are one operation in every block."""
    adapters = [block.mlp.adapters.sets[""] for block in model.vit.blocks]
    families = {choose_family(each.routing.kernel, DEVICE, each.config.experts, each.config.rank) for each in adapters}
    return families == {"one tile"} and all(frozen_weights(block.mlp) for block in model.vit.blocks)


@pytest.mark.parametrize("labelled", ["all", "some"])
@pytest.mark.parametrize("size", SIZES)
def test_triton_predicts_and_learns_as_the_reference(size, labelled):
    model = make(SIZES[size])
    plain = copy.deepcopy(model)
    plain.routing.kernel = "reference"
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    some = {"seg": torch.tensor([0, 1], device=DEVICE), "edge": torch.tensor([1], device=DEVICE)}
    index = None if labelled == "all" else some
    actual, expected = results(model, images, index), results(plain, images, index)
    assert fused(model) and not fused(plain)
    assert actual.keys() == expected.keys() and sum("routers" in name for name in expected) == SIZES[size].depth
    for name, right in expected.items():
        left = actual[name]
        if right is None:  # the head of a task without images
            assert left is None and labelled == "some" and name.startswith("heads."), name
            continue
        assert right.norm() > 0 and (left - right).norm() <= CLOSE * right.norm(), name
