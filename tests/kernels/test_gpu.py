"""On an NVIDIA GPU: the compiled kernels keep what the interpreter promised, and what only a GPU can show.

All shapes share the specialisations of eight kinds of pool, gating and type, so that compiling the kernels takes a
few minutes. ``bash bench/gpu.sh OUTDIR`` runs these tests beside the sanitizer and the benchmark.
"""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton's wheels are for Linux")


from kernels import Gating, TaskSegments, custom_ops, lora_moe  # noqa: E402
from kernels.custom_ops import ALGORITHMS  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

DEVICE = torch.device("cuda")
WIDTH, TASKS = 768, 5
# ViT-B on images of 224: 197 tokens each. Eight images dealt to five tasks, eight images for each of five tasks, and
# the 1,576 tokens again, one task with none, one with a single token, none with a multiple of a tile.
COUNTS = {"T=1576": (394, 394, 394, 197, 197), "T=7880": (1576,) * TASKS, "uneven": (0, 1, 700, 63, 812)}
KINDS = [
    ("ase", (16, 3, 1, 4), torch.bfloat16),
    ("topk", (16, 4, 0, 4), torch.bfloat16),
    ("topk-renorm", (16, 4, 0, 4), torch.bfloat16),
    ("naive-shared", (16, 3, 1, 4), torch.bfloat16),
    ("ase", (64, 12, 4, 1), torch.bfloat16),
    ("ase", (16, 3, 1, 16), torch.bfloat16),  # R = 256, the widest
    ("ase", (16, 3, 1, 4), torch.float16),
    ("ase", (16, 3, 1, 4), torch.float32),
]
NAMES = ("y", "g", "P", "dx", "dA", "dB", "dW")


def name(kind) -> str:
    gating, shape, dtype = kind
    return f"{gating}-{'/'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}"


kinds = pytest.mark.parametrize("kind", KINDS, ids=name)
algorithms = pytest.mark.parametrize("algorithm", [*ALGORITHMS, "linear"])
base_kinds = pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=name)


@dataclass
class Call:
    """One forward and backward pass: its tensors, and the gradients dy of y and dp of P that come back."""

    gating: Gating
    segments: TaskSegments
    x: Tensor
    base: Tensor
    a: Tensor
    b: Tensor
    routers: Tensor
    dy: Tensor
    dp: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.a, self.b, self.routers

    def forward(self, kernel: str = "triton") -> tuple[Tensor, Tensor, Tensor]:
        return lora_moe(self.x, self.base, (self.a, self.b), self.routers, self.segments, self.gating, kernel=kernel)

    def exact_base(self, x: Tensor) -> Tensor:
        return self.base.double()

    def __call__(self, kernel: str = "triton") -> dict[str, Tensor]:
        """Results and gradients, by name."""
        y, g, p = self.forward(kernel)
        gradients = torch.autograd.grad((y, p), self.leaves, (self.dy, self.dp))
        return dict(zip(NAMES, (y.detach(), g.detach(), p.detach(), *gradients), strict=True))

    def exact(self, selected: Tensor) -> dict[str, Tensor]:
        """The same in fp64, with ``selected`` (T, N - S) for the top-k: a logit that rounds to the other side of
        another selects other experts, which is no error of arithmetic and would drown all that are."""
        x, a, b, routers = (leaf.detach().double().requires_grad_() for leaf in self.leaves)
        runs = zip(x.split(self.segments.counts), routers, strict=True)
        z = torch.cat([run @ router.T for run, router in runs])
        if self.gating.name in ("ase", "topk-renorm"):
            always = selected.new_ones(len(x), self.gating.shared)
            g = z.masked_fill(~torch.cat([selected, always], 1), -torch.inf).softmax(1)
        else:
            g = torch.cat([z.softmax(1) * selected, z.new_ones(len(x), self.gating.shared)], 1)
        y = self.exact_base(x) + (x @ a.T * g.repeat_interleave(len(a) // g.shape[1], 1)) @ b.T
        p = torch.stack([run.sum(0) / max(len(run), 1) for run in z.softmax(1).split(self.segments.counts)])
        gradients = torch.autograd.grad((y, p), (x, a, b, routers), (self.dy.double(), self.dp.double()))
        return dict(zip(NAMES, (y.detach(), g.detach(), p.detach(), *gradients), strict=True))


@dataclass
class FusedCall(Call):
    """The same on the frozen fc1 and fc2 of ``linears``, or its linear layer (``base`` is not read), computed in
    ``algorithm``."""

    linears: tuple[tuple[Tensor, Tensor], ...]
    algorithm: str

    def forward(self, kernel: str = "triton") -> tuple[Tensor, Tensor, Tensor]:
        rest = (self.a, self.b), self.routers, self.segments, self.gating
        if kernel == "reference":
            return lora_moe(self.x, self.linears, *rest, kernel=kernel)
        return custom_ops.lora_moe(self.x, self.linears, *rest, algorithm=self.algorithm)

    def exact_base(self, x: Tensor) -> Tensor:
        *down, up = ([t.double() for t in linear] for linear in self.linears)
        for linear in down:
            x = F.gelu(F.linear(x, *linear))
        return F.linear(x, *up)


def make_fused(kind=KINDS[0], counts=COUNTS["T=1576"], algorithm: str = "") -> FusedCall:
    """An FFN, or a linear layer where ``algorithm`` is "linear"."""
    call, rng, dtype = make_call(kind, counts), torch.Generator().manual_seed(1), kind[2]

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*size, generator=rng)).to(dtype).to(DEVICE)

    widths = (WIDTH, WIDTH) if algorithm == "linear" else (WIDTH, 4 * WIDTH, WIDTH)
    linears = tuple((normal(n, m, std=m**-0.5), normal(n)) for m, n in pairwise(widths))
    return FusedCall(**vars(call), linears=linears, algorithm="" if algorithm == "linear" else algorithm)


def make_call(kind=KINDS[0], counts=COUNTS["T=1576"]) -> Call:
    """Numbers of the size a trained layer has; A and B are fp32 masters of numbers that ``dtype`` holds."""
    gating, (experts, k, shared, rank), dtype = kind
    gate, tokens = Gating(gating, k, shared), sum(counts)
    rng = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*size, generator=rng)).to(dtype).to(DEVICE)

    x, base = normal(tokens, WIDTH).requires_grad_(), normal(tokens, WIDTH).requires_grad_()
    a = normal(experts * rank, WIDTH, std=WIDTH**-0.5).float().requires_grad_()
    b = normal(WIDTH, experts * rank, std=0.02).float().requires_grad_()
    columns = gate.router_columns(experts)
    routers = torch.randn(TASKS, columns, WIDTH, generator=rng).mul(0.03).to(DEVICE).requires_grad_()
    dp = torch.randn(TASKS, columns, generator=rng).to(DEVICE)
    return Call(gate, TaskSegments.of(tuple(counts), DEVICE), x, base, a, b, routers, normal(tokens, WIDTH), dp)


def errors(call: Call, kernel: str) -> dict[str, float]:
    """|actual - exact| / |exact|, in the Euclidean norm, of each result, both with the mask of ``actual``."""
    actual = call(kernel)
    expected = call.exact(actual["g"][:, : call.routers.shape[1] - _shared_columns(call)] > 0)
    return {key: ((actual[key].double() - t).norm() / t.norm()).item() for key, t in expected.items()}


def _shared_columns(call: Call) -> int:
    return call.gating.shared if call.gating.name == "ase" else 0


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, t in expected.items():
        assert torch.equal(actual[key], t), key


def assert_errors_are_those_of_the_type(call: Call) -> None:
    ours = errors(call, "triton")
    if call.x.dtype == torch.float32:
        # Products of 768 to 3,072 terms, and sums over tokens in blocks, rounded at 6e-8 each: a few 1e-7.
        assert max(ours.values()) <= 2e-6, ours
        return
    plain = errors(call, "reference")
    # g and P have fp32 logits in both. Half-precision tokens meet fp32 routers in two halves, exact to 2^-17 in bf16,
    # so that logits of the size of 1 are off by 2^-17, which plain fp32 products are not.
    floor = {"g": 2**-16, "P": 2**-16}
    bounds = {key: max(1.1 * error, floor.get(key, 0)) for key, error in plain.items()}
    worse = {key: (error, plain[key]) for key, error in ours.items() if error > bounds[key]}
    assert not worse, worse


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@kinds
def test_errors_are_those_of_the_type(kind, counts):
    assert_errors_are_those_of_the_type(make_call(kind, counts))


@pytest.mark.parametrize("counts", ["T=7880", "uneven"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], *KINDS[4:]], ids=name)
@algorithms
def test_errors_of_fused_layers_are_those_of_the_type(algorithm, kind, counts):
    assert_errors_are_those_of_the_type(make_fused(kind, COUNTS[counts], algorithm))


@base_kinds
@algorithms
def test_ten_runs_of_fused_layers_have_the_same_bits_and_never_wait(algorithm, kind):
    call = make_fused(kind, COUNTS["uneven"], algorithm)
    first = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        repeats = [call() for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for repeat in repeats:
        assert_same_bits(repeat, first)


def test_a_task_without_tokens_gets_zeros():
    call = make_call(counts=COUNTS["uneven"])
    results = call()
    assert results["P"][0].eq(0).all() and results["dW"][0].eq(0).all()
    assert all(t.isfinite().all() for t in results.values())


@base_kinds
def test_ten_runs_have_the_same_bits(kind):
    call = make_call(kind, COUNTS["T=7880"])
    first = call()
    for _ in range(9):
        assert_same_bits(call(), first)


@base_kinds
@pytest.mark.parametrize("what", ["tokens of each task", "tasks"])
def test_a_permutation_permutes_the_bits(kind, what):
    call = make_call(kind, COUNTS["uneven"])
    tasks = torch.randperm(TASKS) if what == "tasks" else torch.arange(TASKS)
    runs = torch.arange(len(call.x)).split(call.segments.counts)
    if what != "tasks":
        runs = [run[torch.randperm(len(run))] for run in runs]
    order = torch.cat([runs[t] for t in tasks]).to(DEVICE)
    tasks = tasks.to(DEVICE)
    segments = TaskSegments.of(tuple(call.segments.counts[t] for t in tasks.tolist()), DEVICE)
    # The same leaves for A and B; the rest in its new order.
    moved = {key: getattr(call, key).detach()[order].requires_grad_() for key in ("x", "base", "dy")}
    moved |= {key: getattr(call, key).detach()[tasks].requires_grad_() for key in ("routers", "dp")}
    before, after = call(), replace(call, segments=segments, **moved)()
    assert_same_bits(after, {key: before[key][order] for key in ("y", "g", "dx")})


@base_kinds
def test_rows_that_lie_apart_give_the_bits_of_contiguous_ones(kind):
    call = make_call(kind)

    def apart(t: Tensor) -> Tensor:
        return torch.cat([t.detach() + 1, t.detach()], 1)[:, WIDTH:].requires_grad_()

    strided = replace(call, x=apart(call.x), base=apart(call.base), dy=apart(call.dy))
    assert not strided.x.is_contiguous()
    assert_same_bits(strided(), call())


def test_the_gradient_of_a_sum_which_has_no_strides_is_understood():
    call = make_call()
    ones = replace(call, dy=torch.ones_like(call.dy), dp=torch.zeros_like(call.dp))
    call.forward()[0].sum().backward()
    assert torch.equal(call.x.grad, ones()["dx"])


@base_kinds
def test_the_host_never_waits_for_the_device(kind):
    call = make_call(kind)
    call()  # compiles, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@base_kinds
def test_a_captured_graph_replays_to_the_same_bits(kind):
    call = make_call(kind)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):  # on the numbers of the capture, and on new ones
        graph.replay()
        replayed = {key: t.clone() for key, t in captured.items()}
        assert_same_bits(replayed, call())
        with torch.no_grad():
            call.x.copy_(call.x.flip(0))
            call.dy.copy_(call.dy.flip(1))


@kinds
def test_nothing_is_saved_but_h_and_logits(kind):
    call = make_call(kind, COUNTS["T=7880"])
    call()  # what Triton and cuBLAS keep for good is there now

    def requested() -> int:  # before the allocator's rounding
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    before = requested()
    results = call.forward()
    kept = requested() - before - sum(t.numel() * t.element_size() for t in results)
    (experts, _, _, rank), size = kind[1], kind[2].itemsize
    assert kept <= len(call.x) * (experts * rank * size + 4 * experts)


def make_model():
    """Two blocks, five tasks, and adapters that do something; the experts are those of KINDS[0]."""
    pytest.importorskip("safetensors", reason="model/ reads weights with it")
    from fastmoe_lora import MoEConfig, adapt
    from model import MultiTaskViT, ViT, ViTConfig

    torch.manual_seed(0)
    vit = ViT(ViTConfig(width=192, depth=2, heads=3), 64)
    routing = adapt(vit, MoEConfig.parse("16/3/1/4"), TASKS, lora_rank=4, kernel="triton")
    for block in vit.blocks:
        torch.nn.init.normal_(block.mlp.lora_B, std=0.05)
    channels = {"seg": 21, "parts": 7, "sal": 2, "normals": 3, "edge": 1}
    return MultiTaskViT(vit, channels, "light", routing).to(DEVICE)


# fp32: both implementations round at 6e-8, over two blocks and heads: 1e-5 leaves room for cancellation.
# bf16: each rounds at 2^-9 = 2e-3 in other places of a dozen products in sequence, and from the second block on the
# experts of a token whose logits nearly tie differ, for some 0.5 % of the tokens: on a CPU the reference's gradients
# are up to 3e-2 from those in fp32. Two such errors, with room: this only finds what is plainly wrong.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
def test_a_small_model_trains_as_with_the_reference(dtype, bound):
    ours = make_model()
    plain = copy.deepcopy(ours)
    plain.routing.kernel = "reference"
    images = torch.randint(0, 256, (8, 3, 64, 64), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    results = []
    for model in (ours, plain):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            predictions = model(images)
        loss = sum(p.float().square().mean() for p in predictions.values()) + model.routing.mi_loss()
        loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append({key: t.float().detach() for key, t in {**predictions, **gradients}.items()})
    assert results[0].keys() == results[1].keys()
    assert any("routers" in key for key in results[0])
    for key, expected in results[1].items():
        error = (results[0][key] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error <= bound, f"{key}: {error:.1e}"


def make_block():
    """A block with a fused FFN that is 192 wide, its routing, and tokens of two images for each task."""
    model = make_model()
    block = model.vit.blocks[0]
    torch.nn.init.normal_(block.mlp.routers, std=192**-0.5)  # or the loss would be left of a cancellation
    return block, model.routing, torch.randn(2 * TASKS, 17, 192, device=DEVICE)


def block_results(block, routing, x: Tensor) -> dict[str, Tensor]:
    """y, the mutual-information loss and every adapter's gradient."""
    with routing.batch((2,) * TASKS) as batch:
        y, loss = block(x), batch.mi_loss()
    wanted = {key: p for key, p in block.named_parameters() if p.requires_grad}
    dy = torch.arange(y.numel(), device=y.device, dtype=y.dtype).sin().view_as(y)
    gradients = torch.autograd.grad((y, loss), list(wanted.values()), (dy, torch.full_like(loss, 10)))
    return {"y": y.detach(), "loss": loss.detach()} | dict(zip(wanted, gradients, strict=True))


def change_adapters(block) -> None:
    with torch.no_grad():
        for p in block.parameters():
            if p.requires_grad:
                p.mul_(1.5)


def test_a_captured_layer_replays_with_the_weights_as_they_are():
    from fastmoe_lora.layers import frozen_weights

    block, routing, x = make_block()
    assert frozen_weights(block.mlp)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            block_results(block, routing, x)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block_results(block, routing, x)
    before = None
    for _ in range(2):
        graph.replay()
        replayed = {key: t.clone() for key, t in captured.items()}
        assert_same_bits(replayed, block_results(block, routing, x))
        assert before is None or not torch.equal(before["y"], replayed["y"])
        before = replayed
        change_adapters(block)


def test_a_compiled_block_is_one_graph_and_uses_the_weights_as_they_are():
    from fastmoe_lora import routing_of

    block, routing, x = make_block()
    torch._dynamo.reset()
    plain = copy.deepcopy(block)
    block.compile(fullgraph=True)
    for _ in range(2):
        actual = block_results(block, routing, x)
        for key, expected in block_results(plain, routing_of(plain), x).items():
            # fp32 sums of up to 768 products in another order.
            assert (actual[key] - expected).norm() <= 1e-5 * expected.norm(), key
        change_adapters(block)
        change_adapters(plain)
