"""The clocks and counters of the benchmark, on steps whose cost is known."""

import time

import pytest
import torch

from bench import floor, layers, measure

CPU = torch.device("cpu")


def test_steps_are_timed_in_turns_and_no_less_than_three_times():
    order = []
    times = measure.paired({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, CPU)
    assert order == ["a", "b"] * 4  # once to warm up
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_a_slower_step_takes_longer_by_as_much():
    times = measure.paired({"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.03)}, 0.05, CPU)
    short, long = (measure.summary(times[name]) for name in ("short", "long"))
    assert 0.015 < long["median"] - short["median"] < 0.025
    assert short["p20"] <= short["median"] <= short["p80"]


def test_a_gpu_sleeps_before_the_first_event_while_the_host_queues_the_step(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: order.append(clocks), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("idle"))
    gpu = torch.device("cuda")
    assert measure.timed(lambda: order.append("step"), gpu, ahead=0.001) == 0.002
    assert order == [2_000_000, "event", "step", "event", "wait"]
    order.clear()
    assert 0.015 < measure.queue_seconds(lambda: time.sleep(0.01), gpu) < 0.04
    assert measure.queue_seconds(lambda: time.sleep(0.06), gpu) == measure.LONGEST_SLEEP
    assert order == ["idle", "idle"] and measure.queue_seconds(lambda: None, CPU) == 0


def test_the_share_of_a_kernel_goes_by_its_name():
    seconds = {"void vectorized<GeluCUDAKernelImpl>": 1.0, "nvjet_tst": 2.0, "gelu_kernel": 1.0}
    assert measure.share(seconds, "gelu") == 0.5


def test_the_summary_is_of_quantiles():
    assert measure.summary([float(n) for n in range(11)]) == pytest.approx({"median": 5.0, "p20": 2.0, "p80": 8.0})


def test_saved_bytes_are_those_of_storages_kept_for_backward_beside_what_was_there():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    # exp keeps its output, 8 x 16 floats; the product keeps x and the weight, which are known
    assert measure.saved_bytes(lambda x: (x @ weight.T).exp(), x, [weight]) == 8 * 16 * 4
    assert measure.saved_bytes(lambda x: (x @ weight.T).exp(), x, []) == 8 * 16 * 4 + 16 * 4 * 4


def test_inputs_rotate():
    inputs = measure.rotate([1, 2, 3])
    assert [next(inputs) for _ in range(5)] == [1, 2, 3, 1, 2]


def test_the_floor_of_the_paper_s_pool_is_the_sum_of_its_parts():
    """ViT-B in bf16 at 40,960 tokens on an H200: 18 us of bytes and 5 us of products, as worked out by hand."""
    shape = layers.Shape(768, 40_960, "16/3/1/4", torch.bfloat16, CPU)
    moved, multiplied = floor.added(shape, backward=False)
    assert moved == 40_960 * (768 * 2 + 2 * 64 * 2 + 4 * 16 + 4 * 16)
    assert multiplied == 2 * 40_960 * 64 * 768
    seconds = floor.floor_seconds(shape, False, 489e-6, {"bytes_per_second": 4.3e12, "flops_per_second": 790e12})
    assert seconds == pytest.approx(489e-6 + 18.3e-6 + 5.1e-6, rel=0.01)


def test_the_work_of_the_frozen_ffn_is_two_products_each_way():
    shape = layers.Shape(768, 40_960, "16/3/1/4", torch.bfloat16, CPU)
    for backward, factor in ((False, 1), (True, 2)):
        multiplied = floor.work(shape, backward)[1] - floor.added(shape, backward)[1]
        assert multiplied == factor * 2 * 2 * 40_960 * 768 * 3_072
