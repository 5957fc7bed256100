"""A batch belongs to a pass: threads, checkpointing, layouts, data that lies, and the regulariser of each."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastmoe_lora import RoutingStatistics, adapt, routing_of, use_adapters
from kernels import UserError

WIDTH = 16
EITHER = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def blocks():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)) for _ in range(2))


def spread(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "routers" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def x():
    return torch.randn(4, 10, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapted():
    """(model, routing) of two tasks, as trained."""
    model = blocks()
    routing = adapt(model, "8/2/1/4", 2, "?.0", lora_rank=2, lora_where="?.2")
    return spread(model), routing


def forward(model, x, how=None, **options):
    """``how`` is None, or checkpoint()'s use_reentrant."""
    for block in model:
        x = block(x) if how is None else checkpoint(block, x, use_reentrant=how, **options)
    return x


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def assert_same(found, right):
    assert found.keys() == right.keys()
    for name in right:
        assert right[name].any(), name
        torch.testing.assert_close(found[name], right[name], rtol=1e-5, atol=1e-7)


class TestCheckpointing:
    @EITHER
    def test_with_backward_in_the_batch_has_the_same_gradients(self, reentrant, adapted, x):
        model, routing = adapted
        found = []
        for how in (None, reentrant):
            with routing.batch([1, 3]):
                forward(model, x.clone().requires_grad_(), how).square().mean().backward()
            found.append(gradients(model))
        assert_same(*found)

    def test_not_reentrant_has_the_regulariser_of_the_pass_and_not_of_the_one_run_again(self, adapted, x):
        model, routing = adapted
        found = []
        for how in (None, False):
            with routing.batch([1, 3]) as batch:
                (forward(model, x, how).square().mean() + batch.mi_loss()).backward()
                with pytest.raises(UserError, match="was called already"):
                    batch.mi_loss()
            with pytest.raises(UserError, match="was called already"):
                routing.mi_loss()
            found.append(gradients(model))
        assert_same(*found)

    def test_reentrant_has_no_regulariser_and_says_so(self, adapted, x):
        model, routing = adapted
        with routing.batch([1, 3]) as batch:
            forward(model, x.clone().requires_grad_(), True)
            with pytest.raises(UserError, match=r"mi_loss\(\) has no gradient: .*use_reentrant=False"):
                batch.mi_loss()

    @EITHER
    def test_two_batches_before_one_backward_pass_outside_of_both_are_refused(self, reentrant, adapted, x):
        model, routing = adapted
        loss = 0
        for images in ([1, 3], [3, 1]):
            with routing.batch(images):
                loss = loss + forward(model, x.clone().requires_grad_(), reentrant).square().mean()
        with pytest.raises(UserError, match=r"call backward\(\) inside, or give checkpoint\(\) context_fn"):
            loss.backward()

    def test_with_its_context_each_layer_runs_again_in_its_own_batch(self, adapted, x):
        model, routing = adapted
        found = []
        for how, options in ((None, {}), (False, {"context_fn": routing.checkpoint})):
            loss = 0
            for images in ([1, 3], [3, 1]):
                with routing.batch(images) as batch:
                    loss = loss + forward(model, x, how, **options).square().mean() + batch.mi_loss()
            with routing.batch([4, 0]) as other:  # which the passes that run again neither read nor change
                forward(model, x)
                loss.backward(retain_graph=True)
                loss.backward()  # again, from what was recomputed again
                assert torch.equal(routing.mi_loss(), torch.zeros(()))
                assert routing.current() is other
            found.append(gradients(model))
        assert_same(*found)

    @EITHER
    def test_in_the_thread_of_another_the_only_open_batch_is_found(self, reentrant, adapted, x):
        """CUDA's backward pass runs in threads of PyTorch."""
        model, routing = adapted
        found = []
        for elsewhere in (False, True):
            with routing.batch([1, 3]):
                loss = forward(model, x.clone().requires_grad_(), reentrant).square().mean()
                in_thread(loss.backward) if elsewhere else loss.backward()
            found.append(gradients(model))
        assert_same(*found)

    def test_runs_again_with_the_set_of_adapters_of_the_pass(self, x):
        model = blocks()
        routing = adapt(model, "8/2/1/4", 2, "?.0")
        other = adapt(model, "8/2/1/4", 2, "?.0", name="other")
        spread(model)
        found = []
        for how, options in ((None, {}), (False, {"context_fn": other.checkpoint}), (False, {})):
            with use_adapters(model, "other"), other.batch([1, 3]):
                loss = forward(model, x, how, **options).square().mean()
                if not options:
                    loss.backward()
            if options:
                with routing.batch([1, 3]):
                    loss.backward()
            assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("_other"))
            found.append({name: grad for name, grad in gradients(model).items() if grad is not None})
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])

    @EITHER
    def test_is_refused_where_it_would_run_again_with_another_set(self, reentrant, x):
        model = blocks()
        adapt(model, None, lora_rank=2, lora_where=["?.0", "?.2"])
        adapt(model, None, lora_rank=2, lora_where=["?.0", "?.2"], name="other")
        with use_adapters(spread(model), "other"):
            loss = forward(model, x.requires_grad_(), reentrant).square().mean()
        with pytest.raises(
            UserError, match=r"outside `with use_adapters\(model, ..\):`.*context_fn=routing.checkpoint"
        ):
            loss.backward()

    def test_of_one_task_without_a_batch_runs_again_without_that_of_another_pass(self, x):
        model = blocks()
        routing = adapt(model, "8/2/1/4", 1, "?.0")
        spread(model)
        found = []
        for options in ({}, {"context_fn": routing.checkpoint}):
            loss = forward(model, x, False, **options).square().mean()
            if options:
                with routing.batch([4], torch.zeros(4, 10)):
                    loss.backward()
            else:
                loss.backward()
            found.append(gradients(model))
        assert_same(*found)


def in_thread(work):
    """Run ``work`` in a thread, and raise here what it raises."""
    raised = []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


class TestThreads:
    def race(self, works, passes=30):
        """Run each of ``works`` (passes) times, all at once; what they return, by thread."""
        gate, found = threading.Barrier(len(works)), [[] for _ in works]

        def run(work, results):
            for _ in range(passes):
                gate.wait()
                results.append(work())

        threads = [threading.Thread(target=run, args=pair) for pair in zip(works, found, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def test_have_their_own_batches(self, adapted, x):
        model, routing = adapted

        def work(images):
            def one():
                with routing.batch(images) as batch, torch.no_grad():
                    return model[1](model[0](x)), batch.mi_loss()

            return one

        works = [work([1, 3]), work([3, 1])]
        right = [one() for one in works]
        assert not torch.equal(right[0][0], right[1][0])
        for found, (y, loss) in zip(self.race(works), right, strict=True):
            assert all(torch.equal(a, y) and torch.equal(b, loss) for a, b in found)

    def test_have_their_own_sets_of_adapters(self, x):
        model = blocks()
        adapt(model, "4/2/1/2", where="?.0")
        adapt(model, None, lora_rank=2, lora_where="?.2", name="other")
        spread(model)

        def work(name):
            def one():
                with use_adapters(model, name), torch.no_grad():
                    return forward(model, x)

            return one

        works = [work(name) for name in ("", "other", None)]
        right = [one() for one in works]
        assert len({y.sum().item() for y in right}) == 3
        for found, y in zip(self.race(works), right, strict=True):
            assert all(torch.equal(each, y) for each in found)

    @pytest.mark.parametrize("others", [1, 2])
    def test_without_a_batch_do_not_take_that_of_another(self, others, adapted, x):
        model, routing = adapted
        opened, done = threading.Barrier(others + 1), threading.Event()

        def hold():
            with routing.batch([2, 2]):
                opened.wait()
                done.wait()

        holders = [threading.Thread(target=hold) for _ in range(others)]
        for holder in holders:
            holder.start()
        opened.wait()
        try:
            with pytest.raises(UserError, match="a pass of 2 tasks outside"):
                forward(model, x)
        finally:
            done.set()
            for holder in holders:
                holder.join()

    def test_that_call_backward_elsewhere_get_the_gradients_of_the_pass(self, adapted, x):
        model, routing = adapted
        found = []
        for elsewhere in (False, True):
            with routing.batch([1, 3]) as batch:
                loss = forward(model, x).square().mean() + batch.mi_loss()
            in_thread(loss.backward) if elsewhere else loss.backward()
            found.append(gradients(model))
        assert_same(*found)


class TestLayouts:
    def encoder_layer(self, batch_first):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=batch_first).eval()
        model = nn.ModuleDict({"layer": layer})
        routing = adapt(model, "8/2/1/4", 2, "layer.linear1")
        return spread(model)["layer"], routing

    def test_sequence_first_is_refused_and_not_routed_wrongly(self, x):
        layer, routing = self.encoder_layer(batch_first=True)
        with routing.batch([2, 2]):
            assert layer(x).shape == x.shape
        layer, routing = self.encoder_layer(batch_first=False)
        with routing.batch([2, 2]), pytest.raises(UserError, match=r"shape \(10, 4, 16\) in a batch of 4"):
            layer(x.transpose(0, 1))

    def test_sequence_first_of_one_task_needs_no_order(self, x):
        layer, _ = self.encoder_layer(batch_first=False)
        model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
        routing_of(model).tasks = 1
        for part in model.modules():
            if hasattr(part, "routers"):
                part.routers = nn.Parameter(part.routers[:1].detach())
        y = model["layer"](x.transpose(0, 1)).transpose(0, 1)
        twin = copy.deepcopy(model)
        twin["layer"].self_attn.batch_first = True
        torch.testing.assert_close(twin["layer"](x), y, rtol=1e-5, atol=1e-6)

    def test_a_leftover_batch_is_refused(self, adapted, x):
        model, routing = adapted
        with routing.batch([1, 3]):
            forward(model, x)
            with pytest.raises(UserError, match="in a batch of 4"):
                forward(model, x[:2])
        with pytest.raises(UserError, match="a pass of 2 tasks outside"):
            forward(model, x)

    def test_an_empty_batch_has_an_empty_output(self, adapted, x):
        model, routing = adapted
        with routing.batch([0, 0]) as batch:
            assert forward(model, x[:0]).shape == (0, 10, WIDTH)
            assert batch.mi_loss() == 0


class TestRegulariser:
    def test_of_padding_alone_is_0_and_has_gradients_of_0(self, adapted, x):
        model, routing = adapted
        with routing.batch([2, 2], torch.zeros(4, 10)) as batch:
            y = forward(model, x)
        loss = batch.mi_loss()
        assert loss == 0 and y.isfinite().all()
        (y.square().mean() + loss).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_stays_on_the_device(self, adapted, x):
        """No value is read by the host: with NCCL alone there is no backend for a tensor on the CPU."""
        model, routing = adapted
        read = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                    read.append(func)
                return func(*args, **(kwargs or {}))

        with Watch(), routing.batch([1, 3]) as batch:
            (forward(model, x).square().mean() + batch.mi_loss()).backward()
        assert read == []

    def test_without_a_gradient_is_an_error_only_where_one_is_needed(self, adapted, x):
        model, routing = adapted
        with routing.batch([1, 3]) as batch, torch.no_grad():
            forward(model, x)
        with pytest.raises(UserError, match="the pass ran under no_grad"):
            batch.mi_loss()
        with routing.batch([1, 3]) as batch, torch.no_grad():
            forward(model, x)
            assert batch.mi_loss() < 0
        model.requires_grad_(False)
        with routing.batch([1, 3]) as batch:
            forward(model, x)
        assert batch.mi_loss() < 0


class TestCopies:
    def test_of_an_average_are_routed_by_their_own_batch(self, adapted, x):
        """An EMA of the weights, made while a batch is open."""
        model, routing = adapted
        model = nn.Sequential(*model)
        with routing.batch([1, 3]):
            model(x)
            average = AveragedModel(model)
        average.update_parameters(model)
        theirs = routing_of(average)
        assert theirs is not routing
        with pytest.raises(UserError, match="a pass of 2 tasks outside"):
            average(x)
        with routing.batch([1, 3]), theirs.batch([3, 1]):
            ema, plain = average(x), model(x)
        with routing.batch([3, 1]):
            assert torch.equal(ema, model(x))
        assert not torch.equal(ema, plain)

    def test_have_no_statistics_of_the_model(self, adapted, x):
        model, routing = adapted
        routing.statistics = RoutingStatistics()
        twin = copy.deepcopy(model)
        with routing.batch([1, 3]), routing_of(twin).batch([1, 3]):
            forward(twin, x)
        assert routing_of(twin).statistics is None and routing.statistics._sums == {}


def test_a_pass_that_is_discarded_and_a_step_change_no_gradient(adapted, x):
    model, routing = adapted
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, fused=True)
    with routing.batch([3, 1]):
        forward(model, x).square().mean().backward()
    with routing.batch([3, 1]):
        forward(model, 2 * x)  # discarded
    optimizer.step()
    gradients(model)
    found = []
    for each in (model, copy.deepcopy(model)):
        with routing_of(each).batch([1, 3]) as batch:
            (forward(each, x).square().mean() + batch.mi_loss()).backward()
        found.append(gradients(each))
    assert_same(*found)


EXPERTS, LORA = (
    {"config": "8/2/1/4", "tasks": 2, "where": "?.0"},
    {"config": None, "lora_rank": 4, "lora_where": ["?.0", "?.2"]},
)


@pytest.mark.parametrize("options", [EXPERTS, LORA], ids=["experts", "LoRA"])
def test_gradients_in_one_batch_are_those_one_by_one(options, x):
    """is_grads_batched, as TorchJD asks for the gradient of each task."""
    model = blocks()
    routing = adapt(model, **options)
    spread(model)
    with routing.batch([1, 3] if routing.tasks > 1 else [4]):
        y = forward(model, x)
    wanted = [p for p in model.parameters() if p.requires_grad]
    dys = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for ours, right in zip(batched, torch.autograd.grad(y, wanted, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], right, rtol=1e-5, atol=1e-6)
