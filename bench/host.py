"""What an adapted FFN costs the host beside the frozen one, with launches that do nothing and tensors that are tiny.

    python -m bench.host [--out FILE] [--config 16/3/1/4] [--seconds 2]

Two rows for each direction: the time of Python, autograd and dispatch alone ("stubbed"), and the same plus 8 us for
every launch, ours and PyTorch's ("launched"), about what a launch costs with a GPU. Packing is part of every
adapted layer's pass; times are of one layer in a chain of twelve. Where the GPU's own time is shorter, at some thousand
tokens, a step takes this long without CUDA graphs. Measure alone on the machine.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import measure
from bench.layers import TASKS
from bench.options import Parser, finish, keep
from fastmoe_lora import adapt
from model import ViT, ViTConfig

LAUNCH_SECONDS = 8e-6
WIDTH, TOKENS, LAYERS = 64, 40, 12
# Operators that launch nothing: views, and memory that is not filled.
FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "flatten", "new_empty", "select",
    "slice", "split", "split_with_sizes", "t", "tensor_split", "transpose", "unbind", "unsqueeze", "view",
    "_unsafe_view",
}  # fmt: skip
Step = Callable[[], object]


class Launches(TorchDispatchMode):
    """Counts operators of PyTorch that would launch a kernel, those within ours too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastmoe_lora":  # look inside
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name.startswith("_foreach"):
            self.count += 1  # one launch for all tensors of a list, on a GPU
        elif name not in FREE:
            self.count += 1
        return func(*args, **kwargs)


@contextmanager
def stubbed() -> Iterator[list[int]]:
    """Triton launches do nothing in here; yields how many there were, in a list of one."""
    from triton.runtime.jit import JITFunction

    count, run = [0], JITFunction.run

    def nothing(self: JITFunction, *args: object, **options: object) -> None:
        count[0] += 1

    JITFunction.run = nothing
    try:
        yield count
    finally:
        JITFunction.run = run


def launches(step: Step) -> int:
    """Launches of one step, ours and PyTorch's."""
    with stubbed():
        step()  # what is done once
    with stubbed() as ours, Launches() as theirs:
        step()
    return ours[0] + theirs.count


class Chain:
    """The FFNs of LAYERS blocks one after the other, adapted or frozen, and what a pass and its backward pass are."""

    def __init__(self, config: str, adapted: bool) -> None:
        torch.manual_seed(0)
        vit = ViT(ViTConfig(width=WIDTH, depth=LAYERS, heads=1), 16).to(torch.bfloat16).requires_grad_(False)
        if adapted:
            self.batch = adapt(vit, config, TASKS, kernel="triton").batch([TOKENS // TASKS] * TASKS)
            self.batch.__enter__()  # stays open
        self.ffns: list[Any] = [block.mlp for block in vit.blocks]
        self.x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        self.dy = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
        self.leaves = [self.x, *(p for p in vit.parameters() if p.requires_grad)]

    def run(self) -> torch.Tensor:
        x = self.x
        for ffn in self.ffns:
            x = ffn(x)
        return x

    @torch.no_grad()
    def forward(self) -> None:
        self.run()

    def forward_and_backward(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.run().backward(self.dy)


def measured(config: str, seconds: float) -> list[dict]:
    """A row for each direction."""
    from kernels import dispatch

    device = torch.device("cpu")
    dispatch._obstacle = lambda device: ""  # nothing could run the kernels here, but nothing is run
    chains = {"adapted": Chain(config, True), "frozen": Chain(config, False)}
    directions = {"forward": Chain.forward, "forward+backward": Chain.forward_and_backward}
    rows = []
    for direction, run in directions.items():
        pair: dict[str, Callable[[], object]] = {name: partial(run, chain) for name, chain in chains.items()}
        counts = {name: launches(step) / LAYERS for name, step in pair.items()}
        with stubbed():
            times = measure.paired(pair, seconds, device)
        taken = {name: min(values) / LAYERS for name, values in times.items()}
        launched = {name: taken[name] + counts[name] * LAUNCH_SECONDS for name in pair}
        rows.append({
            "direction": direction, "launches": counts,
            "stubbed": taken, "stubbed_ratio": taken["adapted"] / taken["frozen"],
            "launched": launched, "launched_ratio": launched["adapted"] / launched["frozen"],
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'':18}{'launches':>16}{'stubbed us':>20}{'ratio':>8}{'launched us':>20}{'ratio':>8}"]
    for row in rows:
        times = [[1e6 * row[what][name] for name in ("adapted", "frozen")] for what in ("stubbed", "launched")]
        pairs = [f"{adapted:.0f} / {frozen:.0f}" for adapted, frozen in times]
        counts = f"{row['launches']['adapted']:.1f} / {row['launches']['frozen']:.1f}"
        ratios = [f"{row[f'{what}_ratio']:.2f}" for what in ("stubbed", "launched")]
        lines.append(f"{row['direction']:18}{counts:>16}{pairs[0]:>20}{ratios[0]:>8}{pairs[1]:>20}{ratios[1]:>8}")
    return "\n".join(["adapted / frozen FFN, host only, a layer", *lines])


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("host", __doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--config", default="16/3/1/4", help="experts as N/k/S/r (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of every measurement (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.host replaces launches: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what no launch fills holds anything, and a CPU multiplies tiny numbers slowly
    rows = measured(chosen.config, chosen.seconds)
    print(table(rows))
    keep(chosen.out, json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    finish(main)
