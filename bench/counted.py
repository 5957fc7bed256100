"""Counts, without a GPU, the launches and bytes per token that our experts and the peers add to the frozen FFN.

    TRITON_INTERPRET=1 python -m bench.counted [--out FILE] [--configs 16/3/1/4,...]

ViT-B's width in fp16, in Triton's interpreter. A byte counts once per launch, since repeats are assumed to hit
the L2. Views are free. Bytes per token are the slope between two numbers of tokens, so that weights do not count: they
are read, cast and packed in each pass, whatever its number of tokens. Nor do the partial sums of weight_grad, which are
as many for both numbers, as they are for all large ones. A peer whose kernels are autotuned is counted
with its first configuration.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.runtime.autotuner import Autotuner

from bench import algorithms
from bench.layers import Problem, Shape, check
from bench.options import Parser, finish, keep, pools
from bench.peers import PEERS
from bench.peers.base import Forward, Peer
from bench.traffic import Traffic, counting
from train.output.tables import format_table

WIDTH, TOKENS = 768, (60, 120)
CONFIGS = ("16/3/1/4", "32/6/2/2", "64/12/4/1")
LARGE_CONFIGS = ("64/12/4/16", "64/12/4/64")
LARGE_PEERS = ("dense", "grouped-mm", "scattermoe")
OURS = Peer("ours", lambda layer: layer)
HEAD = ["experts", "subject", "launches: forward", "backward", "bytes a token: forward", "backward", "/ ours"]


def first_configuration(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
    """Replaces Autotuner.run and times nothing."""
    return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


def count(problem: Problem, forward: Forward) -> tuple[Traffic, Traffic]:
    """(forward, backward) of one pass."""
    x = problem.x[0]
    with counting(len(x)) as ahead:
        y = forward(x)
    with counting(len(x)) as back:
        torch.autograd.grad(y, [x, *problem.parameters], problem.dy[0], allow_unused=True)
    return ahead, back


def steps(traffic: Traffic) -> int:
    return sum(traffic.launches.values()) + sum(traffic.operators.values())


def measure(config: str, peer: Peer) -> dict:
    """One row: launches and bytes per token beyond those of the frozen FFN."""
    few, many = (added(config, peer, tokens) for tokens in TOKENS)
    slope = [(more - less) / (TOKENS[1] - TOKENS[0]) for more, less in zip(many[1], few[1], strict=True)]
    return {"config": config, "subject": peer.name, "launches": many[0], "bytes_per_token": slope}


def added(config: str, peer: Peer, tokens: int) -> tuple[list[int], list[int]]:
    """(launches, bytes) that the peer adds, each [forward, backward]."""
    problem = Problem(Shape(WIDTH, tokens, config, torch.float16, torch.device("cpu")), "triton")
    check(peer, problem)
    pairs = list(zip(count(problem, peer.build(problem.layer)), count(problem, problem.frozen), strict=True))
    return [steps(own) - steps(base) for own, base in pairs], [own.everything - base.everything for own, base in pairs]


def subjects(config: str) -> list[Peer]:
    """Who is counted on ``config``; of large pools ours by both algorithms, the reference and the sorted peers."""
    if config in LARGE_CONFIGS:
        return [OURS, algorithms.GROUPED, *(PEERS[name] for name in LARGE_PEERS if PEERS[name].countable)]
    return [OURS, *(peer for peer in PEERS.values() if peer.countable)]


def table(rows: list[dict]) -> str:
    ours = {row["config"]: sum(row["bytes_per_token"]) for row in rows if row["subject"] == "ours"}
    lines = [
        [
            row["config"],
            row["subject"],
            *map(str, row["launches"]),
            *(f"{n:,.0f}" for n in row["bytes_per_token"]),
            f"{sum(row['bytes_per_token']) / ours[row['config']]:.1f}",
        ]
        for row in rows
    ]
    return format_table([HEAD, *lines], text_columns=2)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("counted", __doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--configs", type=pools, default=CONFIGS + LARGE_CONFIGS, help="N/k/S/r,...")
    chosen = parser.parse_args(arguments)
    if not triton.knobs.runtime.interpret:
        print("bench.counted counts in Triton's interpreter: set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    Autotuner.run = first_configuration
    combinations = [(config, peer) for config in chosen.configs for peer in subjects(config)]
    rows = [measure(*combination) for combination in tqdm(combinations, "count", leave=False)]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    results = {"width": WIDTH, "tokens": list(TOKENS), **versions, "rows": rows}
    print(table(rows))  # first, so that a full disk does not lose it
    keep(chosen.out, json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    finish(main)
