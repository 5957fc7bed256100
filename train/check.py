"""``python -m train.check --data DIR``: reads every file of a tree and reports its content and its faults."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernels import UserError
from train.cli import Parser, add_cache, add_val_images, guarded, new_folder
from train.datasets.base import open_tree
from train.datasets.cache import open_cache
from train.datasets.files import group_by_tasks
from train.datasets.handedness import describe_handedness
from train.datasets.inspection import Finding, inspect_images
from train.datasets.labels import ImageFiles, LabelReader
from train.datasets.tree import Tree, list_images
from train.files.atomic import write_text
from train.files.folders import claim
from train.output.tables import format_table
from train.protocols.base import finish_labels
from train.tasks import TASKS, VOID, Classes, parse_tasks

SHOWN_FAULTS = 10
PICTURES = 12

DESCRIPTION = """\
Read every photo and label of a tree, as training would, and print its content and its faults.
OUT receives sheet.png, a dozen images with their labels, and faults.txt.
Exit status: 0 nothing is wrong, 1 files are missing or damaged, 2 a user's mistake."""


@dataclass(frozen=True)
class Split:
    """The images of a split and one finding per image."""

    name: str
    images: list[ImageFiles]
    findings: list[Finding]

    @property
    def faults(self) -> list[str]:
        return [fault for finding in self.findings for fault in finding.faults]

    def pixels(self, task: str) -> Counter[int]:
        """Pixels of each value of a label, over all images."""
        total: Counter[int] = Counter()
        for finding in self.findings:
            total.update(finding.pixels.get(task, {}))
        return total


def build_parser() -> Parser:
    parser = Parser("train.check", DESCRIPTION)
    parser.add_argument("--data", metavar="DIR", required=True, help="the tree, or the folder that contains it")
    add_val_images(parser)
    parser.add_argument("--tasks", metavar="A,B", help="tasks to check (all that the data set has labels for)")
    parser.add_argument("--partial-labels", action="store_true", help="do not count a missing label file as a fault")
    parser.add_argument(
        "--workers", type=int, metavar="N", default=os.cpu_count(), help="number of processes (%(default)s)"
    )
    add_cache(parser)
    parser.add_argument("--out", metavar="DIR", help=new_folder("runs/check"))
    return parser


def check(tree: Tree, tasks: Sequence[str], partial_labels: bool, reader: LabelReader, workers: int) -> list[Split]:
    """The splits train and val, with every image inspected."""
    listed = {split: list_images(tree, split, tasks, partial_labels) for split in tree.official}
    return [Split(split, images, inspect_images(images, reader, workers, split)) for split, images in listed.items()]


def describe(splits: Sequence[Split], tasks: Sequence[str], tree: Tree) -> str:
    """Tables: the splits, then per task the labelled images and the share of each class in their pixels."""
    rows = [["split", "images", "official", "faulty", "width", "height"]]
    for split in splits:
        faulty = sum(bool(finding.faults) for finding in split.findings)
        sizes = np.array([finding.size for finding in split.findings if finding.size])
        sides = ["/".join(f"{np.quantile(side, q):.0f}" for q in (0, 0.5, 1)) for side in sizes.T[::-1]] or ["-", "-"]
        counts = len(split.images), "-" if tree.val_images else tree.official[split.name], faulty
        rows.append([split.name, *map(str, counts), *sides])
    tables = [format_table(rows) + "\n(width and height: smallest/median/largest)"]
    return "\n\n".join([*tables, *(format_table(_task_rows(task, splits, tree.classes)) for task in tasks)])


def _task_rows(task: str, splits: Sequence[Split], classes: Classes) -> list[list[str]]:
    labelled = [sum(task in finding.pixels for finding in split.findings) for split in splits]
    rows = [[task, *(f"{split.name} %" for split in splits)], ["images", *map(str, labelled)]]
    pixels = [split.pixels(task) for split in splits]
    names = dict(enumerate(TASKS[task].value_names(classes.get(task, ())))) | (
        {VOID: "void"} if any(VOID in counts for counts in pixels) else {}
    )
    for value, name in names.items():
        rows.append([name, *(share(counts[value], counts.total()) for counts in pixels)])
    return rows


def share(part: int, whole: int) -> str:
    """Percent with three decimals: "-" for no pixel, "<0.001" for a share that would round to 0."""
    if not part:
        return "-"
    return f"{100 * part / whole:.3f}" if 100 * part >= 0.0005 * whole else "<0.001"


def describe_faults(faults: Sequence[str]) -> str:
    if not faults:
        return "nothing is wrong"
    more = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    return "\n  ".join([f"faults: {len(faults)}", *faults[:SHOWN_FAULTS], *more])


def draw(path: Path, splits: Sequence[Split], reader: LabelReader, classes: Classes) -> None:
    """Writes a contact sheet of a dozen images without faults and their labels.

    The images come from every group of images that are labelled for the same tasks.
    """
    from train.output import pictures

    whole = [
        image
        for split in splits
        for image, finding in zip(split.images, split.findings, strict=True)
        if not finding.faults
    ]
    if not whole:
        return
    rng, painted = np.random.default_rng(), {}  # finish_labels draws no random number
    for index in pictures.spread(group_by_tasks([tuple(image.labels) for image in whole]), PICTURES):
        sample = finish_labels(reader.sample(whole[index]), rng)
        labels = {task: TASKS[task].paint_label(sample[task]) for task in whole[index].labels}
        shown = {"image": sample["image"]} | labels
        painted[whole[index].id] = {name: pictures.thumbnail(picture) for name, picture in shown.items()}
    pictures.save_contact_sheet(path, painted, classes)


def run(options: Any) -> int:
    tree = open_tree(options.data, options.val_images)
    tasks = parse_tasks(options.tasks or ",".join(tree.files))
    if options.workers < 0:
        raise UserError(f"workers is {options.workers}: it must not be negative")
    reader = tree.reader(open_cache(options.cache))
    out = claim(options.out, "train.check", ("faults.txt", "sheet.png"), "runs/check")
    print(f"tree  {tree}", flush=True)
    splits = check(tree, tasks, options.partial_labels, reader, options.workers)
    faults = [fault for split in splits for fault in split.faults]
    write_text(out / "faults.txt", "".join(f"{fault}\n" for fault in faults))
    draw(out / "sheet.png", splits, reader, tree.classes)
    print(f"\n{describe(splits, tasks, tree)}")
    if "normals" in tasks:
        found = [finding.asymmetry for split in splits for finding in split.findings if finding.asymmetry]
        print(f"\n{describe_handedness(found)}")
    print(f"\n{describe_faults(faults)}\n\n{out}/: sheet.png, faults.txt")
    return 1 if faults else 0


def main(argv: list[str] | None = None) -> int:
    """Check; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
