"""``python -m train.lossdiff RUN RUN``: where the losses of two runs part, and by how much."""

import math
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from kernels import UserError
from train.cli import Parser, guarded, new_folder
from train.files.atomic import write_json
from train.files.folders import claim
from train.output.tables import format_table
from train.run.record import Row, read_record

DESCRIPTION = """\
Compare the losses of two runs step by step: kernels, numbers of processes, versions of the code, machines.
A RUN is an output folder of python -m train, or its metrics.jsonl. OUT receives lossdiff.json and lossdiff.png.
Exit status: 0; 1 if the losses differ and --assert-equal, or differ by more than --rtol; 2 a user's mistake."""


@dataclass(frozen=True)
class Difference:
    """Of one task: the first step whose losses are not the same number (None: there is none), the step of the largest
    relative difference |a - b| / max(|a|, |b|), and that difference; infinite where one of them is not finite."""

    first: int | None
    worst: int
    largest: float


def build_parser() -> Parser:
    parser = Parser("train.lossdiff", DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs=2)
    allowed = parser.add_mutually_exclusive_group()
    allowed.add_argument("--assert-equal", action="store_true", help="every loss must be the same number")
    allowed.add_argument("--rtol", type=float, metavar="X", help="relative difference that no loss may exceed")
    parser.add_argument("--out", metavar="DIR", help=new_folder("runs/lossdiff"))
    return parser


def relative(a: float, b: float) -> float:
    if a == b or math.isnan(a) and math.isnan(b):
        return 0.0
    return abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf


def compare(one: dict[int, Row], other: dict[int, Row], column: int) -> Difference:
    """The difference in a column, over the steps that both have."""
    steps = sorted(one.keys() & other.keys())
    apart = {step: relative(one[step][column], other[step][column]) for step in steps}
    worst = max(steps, key=apart.__getitem__)
    return Difference(next((step for step in steps if apart[step]), None), worst, apart[worst])


def describe(differences: dict[str, Difference], steps: int) -> str:
    rows = [["task", "first difference", "largest", "at step"]]
    for task, found in differences.items():
        first = "none" if found.first is None else f"step {found.first}"
        rows.append([task, first, f"{found.largest:.2e}", "-" if found.first is None else str(found.worst)])
    return f"{format_table(rows)}\n(relative differences over {steps} common steps)"


def draw(path: Path, tasks: tuple[str, ...], names: list[str], runs: tuple[dict[int, Row], dict[int, Row]]) -> None:
    """Per task the losses of both runs, and their relative difference below."""
    from train.output import pictures

    steps = sorted(runs[0].keys() & runs[1].keys())
    curves = {task: [[run[step][column] for step in steps] for run in runs] for column, task in enumerate(tasks)}
    apart = {task: [relative(a, b) for a, b in zip(*pair, strict=True)] for task, pair in curves.items()}
    pictures.save_loss_curves(path, steps, names, curves, apart)


def run(options: Namespace) -> int:
    records = [read_record(Path(given)) for given in options.runs]
    (tasks, others), (one, other) = (record.tasks for record in records), (record.losses for record in records)
    if tasks != others:
        raise UserError(f"the runs have other tasks, {', '.join(tasks)} and {', '.join(others)}: give runs of the same")
    common = one.keys() & other.keys()
    if not common:
        raise UserError("the runs have no step in common: nothing can be compared")
    if options.rtol is not None and not options.rtol >= 0:
        raise UserError(f"rtol is {options.rtol}: it must be at least 0")
    differences = {task: compare(one, other, column) for column, task in enumerate(tasks)}
    print(describe(differences, len(common)))
    out = claim(options.out, "train.lossdiff", ("lossdiff.json", "lossdiff.png"), "runs/lossdiff")
    draw(out / "lossdiff.png", tasks, options.runs, (one, other))
    write_json(out / "lossdiff.json", {task: vars(found) for task, found in differences.items()})
    print(f"\n{out}/: lossdiff.json, lossdiff.png")
    if len(common) < max(len(one), len(other)) and options.assert_equal:
        print(f"the runs have {len(one)} and {len(other)} steps", file=sys.stderr)
        return 1
    allowed = 0.0 if options.assert_equal else math.inf if options.rtol is None else options.rtol
    wrong = {task: found for task, found in differences.items() if found.largest > allowed}
    if wrong:
        texts = [f"{task} by {found.largest:.2e} at step {found.worst}" for task, found in wrong.items()]
        print(f"the losses differ: {', '.join(texts)}", file=sys.stderr)
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    """Compare; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
