"""An adapted block under torch.compile: one graph, the same numbers, no second compilation, the newest weights."""

import copy
import os
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from fastmoe_lora import MoEConfig, Packing, adapt  # noqa: E402
from kernels.dispatch import RESOLVED  # noqa: E402
from model.vit import ViT, ViTConfig  # noqa: E402

IMAGES, TOKENS, WIDTH = (1, 0, 2), 5, 16
EVERY_KERNEL = pytest.mark.parametrize("kernel", ["triton", "reference"])
# A pool of rank 3 runs through kernels.experts.
EVERY_CASE = pytest.mark.parametrize(
    ("kernel", "site", "rank"),
    [("triton", "mlp", 2), ("reference", "mlp", 2), ("triton", "fc1", 2), ("triton", "mlp", 3)],
)
# Norm of the difference over the norm: compilers reorder fp32 sums of some hundred products; rounding is 1e-6.
CLOSE = 1e-5

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the modules here are on the CPU; see test_gpu.py")


@pytest.fixture(autouse=True)
def _afresh(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    RESOLVED.clear()  # another test may have asked without the interpreter
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Adapted:
    """Block and routing of a small ViT, as trained: B nonzero, routers that tell experts apart."""

    def __init__(self, kernel, site="mlp", rank=2):
        vit = ViT(ViTConfig(width=WIDTH, depth=1, heads=2, patch=8), 16)
        config = MoEConfig(6, 2, 1, rank)
        self.routing = adapt(vit, config, len(IMAGES), f"*.{site}", lora_rank=4, kernel=kernel)
        (self.block,) = vit.blocks
        with torch.no_grad():
            for name, parameter in vit.named_parameters():
                if name.endswith(("lora_B", "routers")):
                    parameter.normal_()
        self.packing = Packing(self.block)
        self.prepare(IMAGES)

    def prepare(self, images):
        """What must precede a compiled pass."""
        self.routing.assign(images)
        self.packing.pack()

    def compiled(self, backend="aot_eager"):
        """A copy whose block is compiled into one graph, and what counts compilations."""
        twin, counter = copy.deepcopy(self), CompileCounterWithBackend(backend)
        twin.prepare(IMAGES)  # a copy has no packed weights
        twin.block.compile(fullgraph=True, backend=counter)
        return twin, counter

    def results(self, x):
        x = x.detach().clone().requires_grad_()
        y = self.block(x)
        loss = self.routing.mi_loss()
        wanted = {"x": x} | {name: p for name, p in self.block.named_parameters() if p.requires_grad}
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((y, loss), list(wanted.values()), (dy, torch.tensor(10.0)))
        return {"y": y.detach(), "loss": loss.detach()} | dict(zip(wanted, gradients, strict=True))


@pytest.fixture
def x():
    return torch.randn(sum(IMAGES), TOKENS, WIDTH)


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        assert right.norm() > 0 and (actual[name] - right).norm() <= CLOSE * right.norm(), name


@EVERY_CASE
def test_a_block_is_one_graph_without_breaks(kernel, site, rank, x):
    explained = torch._dynamo.explain(Adapted(kernel, site, rank).block)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@EVERY_CASE
def test_results_and_gradients_are_the_eager_ones_and_compiling_happens_once(kernel, site, rank, x):
    eager = Adapted(kernel, site, rank)
    compiled, counter = eager.compiled()
    for tokens in (x, x.flip(1)):
        eager.prepare(IMAGES)
        compiled.prepare(IMAGES)
        assert_close(compiled.results(tokens), eager.results(tokens))
    assert counter.frame_count == 1


@EVERY_KERNEL
def test_after_an_optimiser_s_step_the_new_weights_are_used_and_nothing_is_compiled_anew(kernel, x):
    eager = Adapted(kernel)
    compiled, counter = eager.compiled()
    eager.routing.kernel = "reference"  # which packs nothing, so that nothing of it can be stale
    both = eager, compiled
    optimizers = [torch.optim.SGD([p for p in each.block.parameters() if p.requires_grad], 1e-3) for each in both]
    outputs = []
    for _ in range(3):
        for each, optimizer in zip(both, optimizers, strict=True):
            each.prepare(IMAGES)
            results = each.results(x)
            for name, parameter in each.block.named_parameters():
                parameter.grad = results.get(name)
            outputs.append(results["y"])
            optimizer.step()
    for plain, ours in zip(outputs[::2], outputs[1::2], strict=True):
        assert (plain - ours).norm() <= CLOSE * plain.norm()
    for before, after in zip(outputs, outputs[2:], strict=False):  # far more than CLOSE, or stale weights would pass
        assert (before - after).norm() > 100 * CLOSE * before.norm()
    assert counter.frame_count == 1


@EVERY_KERNEL
def test_other_counts_of_images_are_understood(kernel, x):
    eager = Adapted(kernel)
    compiled, _ = eager.compiled()
    for images in (IMAGES, (2, 1, 0), IMAGES):
        for each in (eager, compiled):
            each.prepare(images)
        assert_close(compiled.results(x), eager.results(x))


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler for the CPU")
def test_inductor_compiles_the_fused_block(x):
    eager = Adapted("triton")
    compiled, counter = eager.compiled("inductor")
    assert_close(compiled.results(x), eager.results(x))
    assert counter.frame_count == 1
