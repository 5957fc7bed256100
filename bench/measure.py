"""Timing and memory. Steps to be compared are timed alternately, so that clock drift affects all of them alike."""

import time
from collections.abc import Callable, Iterator
from statistics import quantiles

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Step = Callable[[], object]
FASTEST_CLOCK = 2e9  # of the GPUs, whose sleep is counted in clocks: on a slower one it is longer
LONGEST_SLEEP = 0.05  # a step that waits for the GPU cannot be queued, however long that sleeps


def paired(steps: dict[str, Step], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step by name. A round runs each step once; there are rounds for about ``seconds`` per step, and
    at least three. On a GPU a time is that between two CUDA events around the step."""
    for step in steps.values():
        step()  # compiles, allocates
    ahead = {name: queue_seconds(step, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    spent = 0.0
    while spent < seconds * len(steps) or len(times[next(iter(steps))]) < 3:
        for name, step in steps.items():
            times[name].append(timed(step, device, ahead[name]))
            spent += times[name][-1] + ahead[name]
    return times


def queue_seconds(step: Step, device: torch.device) -> float:
    """How long a GPU must be busy so that the host can launch the whole step meanwhile; 0 elsewhere."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return min(1.5 * (time.perf_counter() - start), LONGEST_SLEEP)


def timed(step: Step, device: torch.device, ahead: float = 0.0) -> float:
    """Seconds of one step. A GPU first sleeps ``ahead`` seconds: an idle one would start at once and then wait for the
    host's launches, and the time would be the host's."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(ahead * FASTEST_CLOCK))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def summary(times: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile."""
    low, _, _, high = quantiles(times, n=5, method="inclusive")
    return {"median": float(torch.tensor(times, dtype=torch.float64).quantile(0.5)), "p20": low, "p80": high}


def graphed(step: Step) -> Step:
    """The step captured in a CUDA graph, without the launches' cost on the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def kernel_seconds(step: Step) -> dict[str, float]:
    """Seconds that the GPU spends in every kernel during one step, by its name."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e6 for event in profiler.key_averages()}


def share(seconds: dict[str, float], word: str) -> float:
    """Of the kernels whose names contain ``word``, in any case, in the sum of all."""
    return sum(n for name, n in seconds.items() if word in name.lower()) / sum(seconds.values())


def peak_bytes(step: Step) -> int:
    """Peak memory during one step, above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, known: list[Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, without x and the ``known`` tensors; each storage counts once."""
    mine = {tensor.untyped_storage().data_ptr() for tensor in (x, *known)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _keep = forward(x)  # noqa: F841  freed storages would be counted twice
    return sum(kept.values())


def rotate(inputs: list) -> Iterator:
    """Cycles through the inputs endlessly."""
    while True:
        yield from inputs


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a large copy, reading and writing counted, and FLOPs per second of a large product."""
    large = device.type == "cuda"
    dtype = torch.bfloat16 if large else torch.float32
    elements, side = (2**30, 8192) if large else (2**24, 1024)
    source, target = (torch.rand(elements, device=device).to(dtype) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = paired({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 0.3, device)
    best = {name: min(values) for name, values in times.items()}
    return {
        "bytes_per_second": 2 * elements * dtype.itemsize / best["copy"],
        "flops_per_second": 2 * side**3 / best["product"],
    }
