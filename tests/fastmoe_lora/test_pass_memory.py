"""The memory of a pass: the wide matrices of one layer at a time, and nothing of the frozen weights that stays."""

import os

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from fastmoe_lora import adapt  # noqa: E402
from kernels.dispatch import known_family  # noqa: E402

LAYERS, TOKENS, WIDTH, HIDDEN = 3, 2, 64, 256

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="launches are left out through the interpreter")


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Live(TorchDispatchMode):
    """Follows the storages that operators make: the bytes of those that still exist, and the most there were."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages(args)}
        for storage in storages(result):
            if storage._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self):
        self.made = {key: pair for key, pair in self.made.items() if not pair[0].expired()}
        return sum(size for _, size in self.made.values())


def storages(values):
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@pytest.fixture(autouse=True)
def _without_launches(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(InterpretedFunction, "run", lambda *arguments, **options: None)
    known_family.cache_clear()


def adapted(dtype):
    """(a chain of adapted FFNs, the bytes that adapting made); few ranks, so that the frozen weights are most of it."""
    model = nn.Sequential(*(FFN() for _ in range(LAYERS))).to(dtype)
    with Live() as live:
        adapt(model, "4/1/1/1", where="?", kernel="triton")
    return model, live.bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_pass_holds_the_wide_matrices_of_one_layer_at_most(dtype):
    model, x = adapted(dtype)[0], torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    up, down = WIDTH * (HIDDEN + 8) * x.element_size(), (HIDDEN + 8 + 8) * WIDTH * x.element_size()
    activations = LAYERS * TOKENS * 4 * HIDDEN * x.element_size()
    for _ in range(2):
        with Live() as forward, torch.no_grad():
            model(x)
        assert up <= forward.peak <= up + activations  # [W2 | B | 0]
        with Live() as both:
            y = model(x)
            kept = both.bytes()
            y.backward(torch.ones_like(y))
        assert kept <= activations
        gradients = sum(p.grad.nbytes for p in (x, *model.parameters()) if p.grad is not None)
        assert up + down <= both.peak <= up + down + activations + 2 * gradients  # and [W1 ; A ; 0 ; W_task ; 0]
        assert both.bytes() <= y.nbytes + gradients  # nothing else stays


def test_frozen_weights_stand_once():
    """Adapting makes the adapters and the offsets of one task; that a pass leaves nothing is seen above."""
    model, made = adapted(torch.float32)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert trained <= made <= trained + sum(buffer.nbytes for buffer in model.buffers())
