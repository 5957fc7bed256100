"""What an adapted FFN costs the host beside the frozen one, with launches that do nothing and tensors that are tiny.

    python -m bench.host [--out FILE] [--config 16/3/1/4] [--seconds 2]

Two rows for each direction: the time of Python, autograd and dispatch alone ("stubbed"), and the same plus 8 us for
every launch, ours and PyTorch's ("launched"), about what a launch costs with a GPU. Packing is part of the adapted
pass, as in training. Where the GPU's own time is shorter, at some thousand tokens, a step takes this long without CUDA
graphs. Measure alone on the machine.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import measure
from bench.layers import Problem, Shape

LAUNCH_SECONDS = 8e-6
WIDTH, TOKENS = 64, 40
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

    def nothing(self, *args, **options) -> None:
        count[0] += 1

    JITFunction.run = nothing
    try:
        yield count
    finally:
        JITFunction.run = run


def launches(step: Step) -> int:
    """Launches of one step, ours and PyTorch's."""
    with stubbed() as ours, Launches() as theirs:
        step()
    return ours[0] + theirs.count


def steps(problem: Problem, forward: Callable) -> dict[str, Step]:
    """A forward pass, and one with its backward pass."""
    x, dy = problem.x[0], problem.dy[0]
    leaves = [x, *problem.parameters]

    def ahead() -> None:
        with torch.no_grad():
            forward(x)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(x).backward(dy)

    return {"forward": ahead, "forward+backward": both}


def measured(config: str, seconds: float) -> list[dict]:
    """A row for each direction."""
    from kernels import dispatch

    device = torch.device("cpu")
    dispatch.RESOLVED["triton", device] = "triton"  # which nothing could run here, but nothing is run
    problem = Problem(Shape(WIDTH, TOKENS, config, torch.bfloat16, device), "triton")
    adapted, frozen = steps(problem, problem.layer), steps(problem, problem.frozen)
    rows = []
    for direction in adapted:
        pair = {"adapted": adapted[direction], "frozen": frozen[direction]}
        counts = {name: launches(step) for name, step in pair.items()}
        with stubbed():
            times = measure.paired(pair, seconds, device)
        taken = {name: min(values) for name, values in times.items()}
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
        counts = f"{row['launches']['adapted']} / {row['launches']['frozen']}"
        ratios = [f"{row[f'{what}_ratio']:.2f}" for what in ("stubbed", "launched")]
        lines.append(f"{row['direction']:18}{counts:>16}{pairs[0]:>20}{ratios[0]:>8}{pairs[1]:>20}{ratios[1]:>8}")
    return "\n".join(["adapted / frozen FFN, host only", *lines])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--config", default="16/3/1/4", help="experts as N/k/S/r (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of every measurement (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.host replaces launches: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    rows = measured(chosen.config, chosen.seconds)
    if chosen.out:
        chosen.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
