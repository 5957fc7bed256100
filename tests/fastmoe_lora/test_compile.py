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

from torch import nn  # noqa: E402

from fastmoe_lora import MoEConfig, RoutingStatistics, adapt, adapters_off, routing_of, use_adapters  # noqa: E402
from kernels.dispatch import known_family  # noqa: E402
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
    known_family.cache_clear()  # another test may have asked without the interpreter
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

    def compiled(self, backend="aot_eager"):
        """A copy whose block is compiled into one graph, and what counts compilations."""
        twin, counter = copy.deepcopy(self), CompileCounterWithBackend(backend)
        twin.block.compile(fullgraph=True, backend=counter)
        return twin, counter

    def results(self, x, images=IMAGES):
        x = x.detach().clone().requires_grad_()
        with self.routing.batch(images) as batch:
            y = self.block(x)
        loss = batch.mi_loss()
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
    adapted = Adapted(kernel, site, rank)
    with adapted.routing.batch(IMAGES):
        explained = torch._dynamo.explain(adapted.block)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@EVERY_CASE
def test_results_and_gradients_are_the_eager_ones_and_compiling_happens_once(kernel, site, rank, x):
    eager = Adapted(kernel, site, rank)
    compiled, counter = eager.compiled()
    for tokens in (x, x.flip(1)):
        assert_close(compiled.results(tokens), eager.results(tokens))
    assert counter.frame_count == 1


@EVERY_KERNEL
def test_after_an_optimiser_s_step_the_new_weights_are_used_and_nothing_is_compiled_anew(kernel, x):
    eager = Adapted(kernel)
    compiled, counter = eager.compiled()
    eager.routing.kernel = "reference"
    both = eager, compiled
    optimizers = [torch.optim.SGD([p for p in each.block.parameters() if p.requires_grad], 1e-3) for each in both]
    outputs = []
    for _ in range(3):
        for each, optimizer in zip(both, optimizers, strict=True):
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
def test_twelve_compositions_of_a_batch_are_one_graph(kernel, x):
    eager = Adapted(kernel)
    compiled, counter = eager.compiled()
    x = torch.cat([x, x]).requires_grad_()
    compositions = [(a, b, 6 - a - b) for a in range(1, 5) for b in range(3)]
    for number, images in enumerate(compositions):
        if number % 6 == 0:  # the others without gradients, which are slow to interpret
            assert_close(compiled.results(x, images), eager.results(x, images))
            continue
        found = []
        for each in (eager, compiled):
            with each.routing.batch(images):
                found.append(each.block(x))
        assert (found[0] - found[1]).norm() <= CLOSE * found[0].norm()
    assert len(compositions) == 12
    assert counter.frame_count == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler for the CPU")
def test_inductor_compiles_the_fused_block(x):
    eager = Adapted("triton")
    compiled, counter = eager.compiled("inductor")
    assert_close(compiled.results(x), eager.results(x))
    assert counter.frame_count == 1


class Small(nn.Module):
    """Cheap to compile: two linear layers, of which plain LoRA or experts adapt one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def small(*arguments, **options):
    """(model with adapters as trained, its routing)."""
    model = Small()
    routing = adapt(model, *arguments, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "routers" in name:
                parameter.normal_()
    return model, routing


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    "options", [{"config": None, "lora_rank": 4, "lora_where": "*"}, {"config": "4/2/1/2", "where": "first"}],
    ids=["LoRA", "experts"],
)  # fmt: skip
def test_training_trains_after_an_eager_pass(options, fullgraph, x):
    """The compiled pass reads the parameters of each step, not those of the first."""
    model, _ = small(**options)
    model(x)
    twin, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=fullgraph, backend=counter)
    losses = {}
    for name, run, trained in (("eager", twin, twin), ("compiled", compiled, model)):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        losses[name] = []
        for _ in range(4):
            loss = run(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["compiled"][-1] < 0.5 * losses["compiled"][0]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x), rtol=CLOSE, atol=CLOSE)
    assert counter.frame_count == 1


def test_sets_of_adapters_have_a_graph_each(x):
    model, _ = small(None, lora_rank=4, lora_where="first")
    adapt(model, None, lora_rank=2, lora_where="second", name="other")
    nn.init.normal_(model.second.lora_B_other)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    outputs = []
    for name in ("", "other", None, "", "other", None):
        with use_adapters(model, name):
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], model(x), rtol=CLOSE, atol=CLOSE)
    assert not outputs[0].equal(outputs[1]) and not outputs[1].equal(outputs[2])
    assert counter.frame_count == 3
    with adapters_off(model):
        assert torch.equal(outputs[2], model(x))


def test_a_compiled_model_is_adapted_copied_and_told_its_batch(x):
    """names of torch.compile do not count, and a pass without a batch is refused as elsewhere."""
    model, routing = small("4/2/1/2", 2, "first")
    compiled = torch.compile(model, backend="aot_eager")
    assert routing_of(compiled) is routing
    with routing.batch([2, 1]):
        right = model(x)
        assert (compiled(x) - right).norm() <= CLOSE * right.norm()
    with pytest.raises(Exception, match="a pass of 2 tasks outside"):
        compiled(x)


@EVERY_KERNEL
def test_batches_of_all_sizes_are_two_graphs_and_a_leftover_is_refused(kernel, x):
    """One of the first size, and one for the others, in which the size is a symbol."""
    model, routing = small("4/2/1/2", 2, "first", kernel=kernel)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    more = range(2, 9) if kernel == "reference" else [3]  # the interpreter is slow
    for images in ([2, 1], [1, 2], [1, 1], [2, 0], *([n, 2] for n in more)):
        tokens = torch.randn(sum(images), TOKENS, WIDTH)
        with routing.batch(images):
            right = model(tokens)
            assert (compiled(tokens) - right).norm() <= CLOSE * right.norm()
    assert counter.frame_count == 2
    with routing.batch([1, 1]), pytest.raises(Exception, match="in a batch of 2: its first axis must be the images"):
        compiled(x)


def test_statistics_of_a_compiled_pass_are_refused_in_words(x):
    model, routing = small("4/2/1/2", 2, "first")
    routing.statistics = RoutingStatistics()
    with routing.batch([2, 1]), pytest.raises(Exception, match="routing statistics are of eager passes"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
