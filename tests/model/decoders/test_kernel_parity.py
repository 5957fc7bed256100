"""The FGMoE decoder under both kernels: predictions and every gradient at its own widths."""

import copy
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels.dispatch import known_family  # noqa: E402
from model import FGConfig, FGMoE  # noqa: E402
from model.decoders import Features, Frame  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHANNELS = {"seg": 5, "sal": 2, "edge": 1}
# Norm of the difference over the norm: fp32 sums of up to 4,096 products in different orders.
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    known_family.cache_clear()  # another test may have asked without the interpreter


def results(decoder, features):
    """Predictions and the gradients of random cotangents."""
    predictions, rng = decoder(features), torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=rng).to(DEVICE) for y in predictions.values()]
    named = dict(decoder.named_parameters())
    gradients = torch.autograd.grad(list(predictions.values()), list(named.values()), cotangents, allow_unused=True)
    return predictions | dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize("gating", ["naive-shared", "ase"])
@pytest.mark.parametrize("per_task", [False, True], ids=["per image", "per image and task"])
def test_triton_decodes_and_learns_as_the_reference(gating, per_task):
    torch.manual_seed(0)
    triton = FGMoE(Frame(8, (2, 3), CHANNELS), FGConfig.parse("2/1/4/1", gating), kernel="triton").to(DEVICE)
    with torch.no_grad():  # as trained: routers that tell experts apart
        for name, parameter in triton.named_parameters():
            if "router" in name or "global_bias" in name:
                parameter.normal_(std=0.2)
    reference = copy.deepcopy(triton)
    reference.kernel = "reference"
    maps = tuple(torch.randn(3, 8, 2, 3, device=DEVICE) for _ in range(4))
    index = {"seg": torch.tensor([0, 1], device=DEVICE), "edge": torch.tensor([2], device=DEVICE)}
    features = Features(maps, index, per_task)
    actual, expected = results(triton, features), results(reference, features)
    for name, right in expected.items():
        left = actual[name]
        if right is None:  # of the task without images
            assert left is None and ".sal." in name, name
            continue
        assert (left - right).norm() <= CLOSE * right.norm(), (name, (left - right).norm() / right.norm())
