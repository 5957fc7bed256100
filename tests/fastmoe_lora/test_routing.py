"""The mutual-information loss, the routing statistics, and the division of a batch among the tasks."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad

from fastmoe_lora import Batch, Routing, RoutingStatistics, mutual_information_loss
from kernels import UserError


def random_probs(tasks: int, experts: int, seed: int = 0, sharpness: float = 2.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(tasks, experts, generator=rng, dtype=torch.float64)).softmax(-1)


def naive_loss(mean_probs: Tensor) -> Tensor:
    """-sum p(t,e) log(p(t,e) / (p(t) p(e))), term by term; a term with p(t,e) = 0 is 0."""
    tasks, experts = mean_probs.shape
    loss = torch.zeros((), dtype=mean_probs.dtype)
    for e in range(experts):
        p_e = sum(mean_probs[t, e] / tasks for t in range(tasks))
        for t in range(tasks):
            p_te = mean_probs[t, e] / tasks
            if p_te > 0:
                loss = loss - p_te * torch.log(p_te / (p_e / tasks))
    return loss


class TestMutualInformationLoss:
    @pytest.mark.parametrize(("tasks", "experts"), [(1, 4), (2, 2), (5, 16), (3, 1)])
    def test_equals_the_double_sum(self, tasks, experts):
        mean_probs = random_probs(tasks, experts)
        # A few dozen terms below 1, each rounded at 1e-16.
        torch.testing.assert_close(mutual_information_loss(mean_probs), naive_loss(mean_probs), rtol=1e-12, atol=1e-14)

    def test_of_several_layers_is_one_value_each(self):
        layers = torch.stack([random_probs(3, 5, seed) for seed in range(4)])
        expected = torch.stack([naive_loss(layer) for layer in layers])
        torch.testing.assert_close(mutual_information_loss(layers), expected, rtol=1e-12, atol=1e-14)

    @settings(deadline=None)
    @given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31), st.floats(0, 100))
    def test_lies_between_minus_log_tasks_and_zero(self, tasks, experts, seed, sharpness):
        loss = mutual_information_loss(random_probs(tasks, experts, seed, sharpness)).item()
        rounding = 1e-14  # of a few dozen terms below log(6)
        assert -math.log(tasks) - rounding <= loss <= rounding

    def test_is_zero_where_all_tasks_route_alike(self):
        alike = random_probs(1, 8).expand(4, 8)
        torch.testing.assert_close(mutual_information_loss(alike).item(), 0.0, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("tasks", [1, 2, 5])
    def test_is_minus_log_tasks_where_no_two_tasks_share_an_expert(self, tasks):
        # Task t spreads unevenly over three experts of its own.
        mean_probs = torch.block_diag(*random_probs(tasks, 3)[:, None])
        torch.testing.assert_close(mutual_information_loss(mean_probs).item(), -math.log(tasks), rtol=1e-14, atol=1e-15)

    def test_gradient_equals_that_of_the_double_sum(self):
        mean_probs = random_probs(5, 16).requires_grad_()
        (actual,) = grad(mutual_information_loss(mean_probs), mean_probs)
        (expected,) = grad(naive_loss(mean_probs), mean_probs)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("sharpness", [2, 40])  # at 40 with probabilities down to 1e-104, which count too
    def test_gradient_is_the_closed_form_that_the_kernels_get(self, sharpness):
        # design/kernels.md: c = -(1/tasks) log(p(t,e) / (p(t) p(e)))
        mean_probs = random_probs(5, 16, sharpness=sharpness).requires_grad_()
        (actual,) = grad(mutual_information_loss(mean_probs), mean_probs)
        expected = -(mean_probs / mean_probs.mean(0)).log() / 5
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_exact_zeros_give_a_finite_loss_and_gradient(self, dtype):
        # Expert 1 is used by one task only, expert 2 by none.
        mean_probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
        loss = mutual_information_loss(mean_probs)
        (gradient,) = grad(loss, mean_probs)
        assert gradient.isfinite().all()
        expected = naive_loss(mean_probs.detach().double())
        # A handful of roundings, each by at most eps / 2.
        torch.testing.assert_close(loss.detach().double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_the_smallest_numbers_give_a_finite_gradient(self, dtype):
        smallest = torch.finfo(dtype).smallest_normal
        mean_probs = torch.tensor([[1.0, smallest], [1.0, smallest / 4]], dtype=dtype, requires_grad=True)
        (gradient,) = grad(mutual_information_loss(mean_probs), mean_probs)
        assert gradient.isfinite().all()


def recorded(images: list[int], *layers: Tensor) -> Batch:
    """A batch after a forward pass in which layer l had the mean probabilities ``layers[l]``."""
    with Routing(len(images)).batch(images) as batch:
        for layer, mean_probs in enumerate(layers):
            batch.record(layer, mean_probs)
    return batch


class TestRoutingMILoss:
    def test_is_the_sum_over_layers(self):
        first, second = random_probs(3, 4, seed=1), random_probs(3, 4, seed=2)
        expected = naive_loss(first) + naive_loss(second)
        torch.testing.assert_close(recorded([1, 2, 1], first, second).mi_loss(), expected, rtol=1e-12, atol=1e-14)

    def test_leaves_out_the_tasks_without_images(self):
        mean_probs = random_probs(4, 6)
        mean_probs[[1, 3]] = 0
        loss = recorded([2, 0, 1, 0], mean_probs).mi_loss()
        torch.testing.assert_close(loss, naive_loss(mean_probs[[0, 2]]), rtol=1e-12, atol=1e-14)

    def test_does_not_weigh_tasks_by_their_images(self):
        mean_probs = random_probs(2, 6)
        assert torch.equal(recorded([7, 1], mean_probs).mi_loss(), recorded([1, 1], mean_probs).mi_loss())

    def test_is_of_the_newest_batch(self):
        old, new = random_probs(2, 4, seed=1), random_probs(2, 4, seed=2)
        routing = Routing(2)
        for probs in (old, new):
            with routing.batch([1, 1]) as batch:
                batch.record(0, probs)
        torch.testing.assert_close(routing.mi_loss(), naive_loss(new), rtol=1e-12, atol=1e-14)

    def test_keeps_no_graph_alive(self):
        mean_probs = random_probs(2, 4).requires_grad_() * 1
        alive = weakref.ref(mean_probs)
        batch = recorded([1, 1], mean_probs)
        batch.mi_loss()
        del mean_probs
        assert alive() is None

    @pytest.mark.parametrize(
        ("layers", "fault"), [([], "saw no pass"), ([0, 0], "saw two passes"), ([0, 0, 1], "saw two passes")], ids=str
    )
    def test_of_no_pass_or_two_is_an_error(self, layers, fault):
        with Routing(2).batch([1, 1]) as batch:
            for layer in layers:
                batch.record(layer, random_probs(2, 4))
        with pytest.raises(UserError, match=rf"mi_loss\(\) {fault}.*: open routing.batch\(\) for each pass"):
            batch.mi_loss()

    def test_is_called_once(self):
        batch = recorded([1, 1], random_probs(2, 4))
        batch.mi_loss()
        with pytest.raises(UserError, match="was called already"):
            batch.mi_loss()

    def test_without_any_batch_is_an_error(self):
        with pytest.raises(UserError, match=r"mi_loss\(\) without a pass"):
            Routing(2).mi_loss()


BATCHES = [(3, 0, 5), (1, 0, 2), (4, 0, 4)]  # tokens per task: unequal, and task 1 never has any


def random_gates(tokens: int, experts: int, rng: torch.Generator) -> Tensor:
    """fp32 gates in multiples of 1/64, so that sums are exact: about half of them zero, the last never."""
    gates = torch.randint(1, 64, (tokens, experts), generator=rng) / 64
    gates[:, :-1] *= torch.rand(tokens, experts - 1, generator=rng) < 0.5
    return gates


class TestRoutingStatistics:
    @pytest.fixture
    def passes(self):
        """(layer, counts, gates) of three batches through two layers."""
        rng = torch.Generator().manual_seed(0)
        return [(layer, counts, random_gates(sum(counts), 4, rng)) for counts in BATCHES for layer in (0, 1)]

    @pytest.fixture
    def statistics(self, passes):
        statistics = RoutingStatistics()
        for layer, counts, gates in passes:
            statistics.add(layer, gates, counts)
        return statistics

    def test_equal_naive_counts_over_several_batches(self, passes, statistics):
        mass, frequency = statistics.compute()
        assert mass.shape == frequency.shape == (2, 3, 4)
        for layer in (0, 1):
            for task in (0, 2):
                for expert in range(4):
                    seen = []
                    for its_layer, counts, gates in passes:
                        start = sum(counts[:task])
                        if its_layer == layer:
                            seen += gates[start : start + counts[task], expert].tolist()
                    assert mass[layer, task, expert].item() == sum(seen) / len(seen)
                    assert frequency[layer, task, expert].item() == sum(g > 0 for g in seen) / len(seen)

    def test_a_task_without_tokens_is_nan(self, statistics):
        for values in statistics.compute():
            assert values.isnan().all(dim=0).all(dim=1).tolist() == [False, True, False]

    def test_an_always_on_expert_has_frequency_one_and_its_own_mass(self, statistics):
        mass, frequency = statistics.compute()
        assert frequency[:, [0, 2], -1].eq(1).all()
        assert mass[:, [0, 2], -1].lt(1).all()

    def test_layers_come_in_their_order_and_not_in_that_of_the_calls(self):
        statistics = RoutingStatistics()
        for layer in (2, 0, 1):
            statistics.add(layer, torch.full((2, 3), float(layer)), (2,))
        assert statistics.compute()[0][:, 0, 0].tolist() == [0, 1, 2]

    def test_are_fed_by_the_routing_only_when_asked_for(self):
        routing = Routing(2)
        with routing.batch([1, 1]) as batch:
            segments, _ = batch.segments(torch.zeros(2, 3))
            gates, mean_probs = torch.ones(2, 3), random_probs(2, 3)
            routing.record(batch, 0, mean_probs, gates, segments)
            routing.statistics = RoutingStatistics()
            routing.record(batch, 0, mean_probs, 3 * gates, segments)
        assert routing.statistics.compute()[0].eq(3).all()

    def test_hold_no_graph(self):
        gates = torch.ones(2, 3, requires_grad=True) * 1
        statistics = RoutingStatistics()
        statistics.add(0, gates, (2,))
        assert not statistics.compute()[0].requires_grad


def counts_in(batch: Batch, *shape: int) -> tuple[int, ...]:
    """The rows of every task in an input of that shape and one channel."""
    segments, _ = batch.segments(torch.zeros(*shape, 1))
    assert segments.offsets.mul(segments.length).diff().tolist() == list(segments.counts)
    return segments.counts


class TestRowsOfABatch:
    @pytest.mark.parametrize(
        ("images", "tokens", "counts", "offsets"),
        [
            ([1, 1], 5, (5, 5), [0, 1, 2]),
            ([2, 0, 1], 3, (6, 0, 3), [0, 2, 2, 3]),
            ([0, 8, 0], 197, (0, 8 * 197, 0), [0, 0, 8, 8]),
            ([3], 1, (3,), [0, 3]),
        ],
        ids=str,
    )
    def test_every_image_has_equally_many_tokens(self, images, tokens, counts, offsets):
        with Routing(len(images)).batch(images) as batch:
            segments, real = batch.segments(torch.zeros(sum(images), tokens, 2))
        assert real is None
        assert segments.counts == counts
        assert segments.offsets.tolist() == offsets
        assert segments.length == tokens
        assert segments.offsets.dtype == torch.int32

    def test_an_image_may_be_a_grid(self):
        with Routing(2).batch([1, 2]) as batch:
            assert counts_in(batch, 3, 4, 5) == (20, 40)

    def test_follow_the_open_batch(self):
        routing = Routing(2)
        for images, counts in [([1, 2], (2, 4)), ([2, 1], (4, 2))]:
            with routing.batch(images):
                assert counts_in(routing.current(), 3, 2) == counts

    def test_after_an_inner_batch_the_outer_one_is_open_again(self):
        routing = Routing(2)
        with routing.batch([1, 2]) as outer:
            with routing.batch([2, 1]) as inner:
                assert routing.current() is inner
            assert routing.current() is outer

    def test_without_a_batch_are_an_error(self):
        routing = Routing(2)
        with routing.batch([1, 2]):
            pass
        with pytest.raises(UserError, match="a pass of 2 tasks outside `with routing.batch"):
            routing.current()

    def test_of_an_empty_batch_are_none(self):
        with Routing(2).batch([0, 0]) as batch:
            assert counts_in(batch, 0, 5) == (0, 0)

    @pytest.mark.parametrize("shape", [(4, 5), (2, 5), (5, 3), (15,)], ids=str)
    def test_of_an_input_whose_first_axis_is_not_the_images_are_an_error(self, shape):
        """One image more or fewer, (L, B, C), rows without their images."""
        with (
            Routing(2).batch([2, 1]) as batch,
            pytest.raises(
                UserError, match=r"an input of shape \(.*\) in a batch of 3: its first axis must be the images"
            ),
        ):
            counts_in(batch, *shape)

    def test_of_one_task_need_no_batch(self):
        routing = Routing(1)
        assert routing.current() is None
        with routing.batch([2]):
            assert counts_in(routing.current(), 2, 7) == (14,)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
    def test_count_what_a_mask_leaves(self, dtype):
        routing = Routing(3)
        mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]]).to(dtype)
        with routing.batch([1, 0, 2], mask) as batch:
            assert counts_in(batch, 3, 3) == (2, 0, 2)
            assert counts_in(batch, 9) == (2, 0, 2)
            assert batch.segments(torch.zeros(3, 3, 1))[1].tolist() == [0, 1, 7, 8]
            assert counts_in(batch, 3, 1) == (1, 0, 2)  # generate() goes on with one real token for each sequence
            with pytest.raises(UserError, match="6 tokens, but the batch was opened for 9"):
                counts_in(batch, 3, 2)
        with routing.batch([1, 0, 2]) as batch:  # the next batch has no padding
            assert counts_in(batch, 3, 3) == (3, 0, 6)

    def test_may_be_given_in_tokens(self):
        with Routing(2).batch_tokens([7, 3]) as batch:
            assert counts_in(batch, 1, 10) == counts_in(batch, 10) == (7, 3)
            with pytest.raises(UserError, match="9 tokens, but the batch was opened for 10"):
                counts_in(batch, 1, 9)

    def test_a_mask_of_another_batch_is_an_error(self):
        with pytest.raises(UserError, match=r"mask of shape \(2, 4\) for 3 images"):
            Routing(2).batch([2, 1], torch.ones(2, 4))

    def test_a_task_that_has_only_padding_is_absent_from_the_mutual_information(self):
        mean_probs = random_probs(3, 4)
        mean_probs[1] = 0
        with Routing(3).batch([1, 1, 1], torch.tensor([[1, 1], [0, 0], [1, 0]])) as batch:
            batch.record(0, mean_probs)
        torch.testing.assert_close(batch.mi_loss(), naive_loss(mean_probs[[0, 2]]), rtol=1e-12, atol=1e-14)

    def test_a_mask_tells_images_from_tokens(self):
        """(L, B, C) has as many rows as (B, L, C)."""
        with (
            Routing(2).batch([1, 2], torch.ones(3, 4)) as batch,
            pytest.raises(UserError, match=r"an input of shape \(4, 3, 1\) in a batch of 3"),
        ):
            counts_in(batch, 4, 3)

    @pytest.mark.parametrize("images", [[], [1], [1, 1, 1]], ids=str)
    def test_one_count_for_each_task_or_an_error(self, images):
        for opened in (Routing(2).batch, Routing(2).batch_tokens):
            with pytest.raises(UserError, match=f"{len(images)} counts for 2 tasks"):
                opened(images)
