"""The adapted FFN, by the table's algorithm and by each, beside the frozen one, its peers and the physical limit.

    pytest bench/ --benchmark-only [--kernel=auto|triton|reference] [--benchmark-json FILE]

Every row is checked against the reference before it is timed. It is timed alternately with the frozen FFN, eager and
compiled, and compared with the faster of these two. bench/README.md explains the numbers of a row; `python -m
bench.report` tabulates and draws them.
"""

from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import algorithms, layers, measure
from bench.floor import floor_seconds, work
from bench.peers import PEERS
from bench.peers.base import Forward, Peer
from kernels import resolve_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# (width, tokens): ViT-S, -B and -L; 8 images of 197 tokens, the same for five tasks, and a large batch.
SHAPES = [(w, t) for w in (384, 768, 1024) for t in (1_575, 7_880, 40_960)] if ON_GPU else [(192, 985)]
CONFIGS = ["16/3/1/4", "32/6/2/2", "64/12/4/1", "16/4/0/4"]
SUBJECTS = {"ours": Peer("ours", lambda layer: layer), **algorithms.subjects(), **PEERS}
# Pools beyond one register tile, by the algorithm that their width chooses, by the sorted one, and by the sorted peers.
LARGE_CONFIGS = ["64/12/4/16", "64/12/4/64"]
LARGE_SHAPES = [(768, 7_880), (768, 40_960)] if ON_GPU else SHAPES
LARGE_SUBJECTS = {
    "ours": SUBJECTS["ours"],
    "ours-grouped": algorithms.GROUPED,
    **{name: PEERS[name] for name in ("dense", "dense-compiled", "grouped-mm", "quack", "scattermoe")},
}


def keep_freed_memory() -> None:
    """glibc returns freed memory above a threshold to the system, and the next step faults every page in again: 0.9 ms
    at width 192, in whichever of the compared steps crosses it. Freeing a large block raises it, see mallopt(3)."""
    torch.empty(31 * 2**20, dtype=torch.uint8)  # larger than 32 MiB would not count


@cache
def problem(width: int, tokens: int, config: str, kernel: str) -> layers.Problem:
    keep_freed_memory()
    return layers.Problem(layers.Shape(width, tokens, config, DTYPE, DEVICE), kernel)


@cache
def compiled_frozen(width: int, tokens: int, kernel: str) -> Forward:
    """One for all pools, whose frozen FFN is the same."""
    return torch.compile(problem(width, tokens, CONFIGS[0], kernel).frozen)


@cache
def ceilings() -> dict[str, float]:
    return measure.ceilings(DEVICE)


def forward_step(forward, inputs):
    @torch.no_grad()
    def step():
        return forward(next(inputs)[0])

    return step


def training_step(forward, inputs):
    def step():
        x, dy = next(inputs)
        x.grad = None
        forward(x).backward(dy)

    return step


STEPS = {"forward": forward_step, "forward+backward": training_step}


@pytest.mark.parametrize("direction", STEPS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("width", "tokens"), SHAPES)
@pytest.mark.parametrize("subject", SUBJECTS)
def bench_ffn(
    benchmark: BenchmarkFixture, kernel: str, subject: str, width: int, tokens: int, config: str, direction: str
) -> None:
    bench(benchmark, kernel, SUBJECTS[subject], problem(width, tokens, config, kernel), direction)


@pytest.mark.parametrize("direction", STEPS)
@pytest.mark.parametrize("config", LARGE_CONFIGS)
@pytest.mark.parametrize(("width", "tokens"), LARGE_SHAPES)
@pytest.mark.parametrize("subject", LARGE_SUBJECTS)
def bench_large_pool(
    benchmark: BenchmarkFixture, kernel: str, subject: str, width: int, tokens: int, config: str, direction: str
) -> None:
    bench(benchmark, kernel, LARGE_SUBJECTS[subject], problem(width, tokens, config, kernel), direction)


def bench(benchmark: BenchmarkFixture, kernel: str, peer: Peer, p: layers.Problem, direction: str) -> None:
    """One row: the check, then the times. An absent peer has none: one of no time would rank first."""
    if reason := peer.absent(DEVICE):
        pytest.skip(f"{peer.name} {reason}")
    width, tokens, config = p.shape.width, p.shape.tokens, p.shape.config
    benchmark.group = f"FFN {direction}, {config}, {p.shape.group}"
    benchmark.extra_info |= {
        "suite": "layer",
        "subject": peer.name,
        "width": width,
        "tokens": tokens,
        "config": config,
        "direction": direction,
        "kernel": resolve_kernel(kernel, DEVICE),
    }
    layers.check(peer, p)
    forwards: dict[str, Forward] = {
        "subject": peer.build(p.layer),
        "frozen": p.frozen,
        "frozen_compiled": compiled_frozen(width, tokens, kernel),
    }
    step, row = measured(p, peer, forwards, direction, float(benchmark._max_time) / 4)
    benchmark.extra_info |= row
    benchmark.pedantic(step, rounds=3)


def measured(
    p: layers.Problem, peer: Peer, forwards: dict[str, Forward], direction: str, seconds: float
) -> tuple[measure.Step, dict]:
    """(the step, the numbers of its row)."""
    backward, inputs = direction != "forward", measure.rotate(list(zip(p.x, p.dy, strict=True)))
    steps = {name: STEPS[direction](forward, inputs) for name, forward in forwards.items()}
    row = on_gpu(steps, seconds) if ON_GPU else {}
    times = {name: measure.summary(taken) for name, taken in measure.paired(steps, seconds, DEVICE).items()}
    taken, frozen = times["subject"]["median"], fastest_frozen(times)
    moved, multiplied = work(p.shape, backward)
    floor = floor_seconds(p.shape, backward, frozen, ceilings())
    row |= {
        "seconds": times,
        "ratio": taken / frozen,
        "added_seconds": taken - frozen,
        "floor_ratio": floor / frozen,
        "of_floor": floor / taken,
        "ceilings": ceilings(),
        "bytes_per_second": moved / taken,
        "flops_per_second": multiplied / taken,
        "saved_bytes": measure.saved_bytes(forwards["subject"], p.x[0], p.weights),
        **correctness(p, peer, forwards["subject"]),
    }
    return steps["subject"], row


def fastest_frozen(times: dict[str, dict[str, float]]) -> float:
    return min(times[name]["median"] for name in ("frozen", "frozen_compiled"))


def correctness(p: layers.Problem, peer: Peer, forward: Forward) -> dict:
    """The errors to fp64, and whether a second run gives the same bits."""
    first, second = p.results(forward), p.results(forward)
    return {
        "error": layers.errors(first, p.exact(peer.reference)),
        "bitwise": all(torch.equal(first[name], second[name]) for name in first),
    }


def on_gpu(steps: dict[str, measure.Step], seconds: float) -> dict:
    """What only a GPU has: CUDA graphs, time in kernels, peak memory. A step that waits for the host has no graph."""
    busy = {name: measure.kernel_seconds(step) for name, step in steps.items()}
    row = {
        "kernel_seconds": {name: sum(kernels.values()) for name, kernels in busy.items()},
        "gelu_share": measure.share(busy["frozen"], "gelu"),
        "peak_bytes": {name: measure.peak_bytes(step) for name, step in steps.items()},
    }
    try:
        graphs = {name: measure.graphed(step) for name, step in steps.items()}
    except RuntimeError as error:
        return row | {"graph": None, "graph_error": str(error).splitlines()[0]}
    taken = {name: measure.summary(t) for name, t in measure.paired(graphs, seconds, DEVICE).items()}
    return row | {"graph": {"seconds": taken, "ratio": taken["subject"]["median"] / fastest_frozen(taken)}}
