"""``python -m train.compare RUN RUN ...``: the scores of runs in one table, and their predictions side by side."""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch

from kernels import UserError
from train.cli import Parser, add_cache, guarded, new_folder
from train.config.settings import Settings
from train.datasets.base import DataSet, open_dataset
from train.datasets.batches import collate
from train.datasets.files import Access
from train.evaluation.baselines import describe_baseline, with_baseline
from train.evaluation.results import Results, read_results
from train.evaluation.seeds import Arms, arms_of, mean_and_deviation, require_comparable_arms
from train.files.atomic import write_text
from train.files.folders import claim
from train.output.formats import FORMATS
from train.run import checkpoint
from train.run.build import load_checkpoint
from train.run.record import NAME, read_record
from train.run.scores import CURVES, draw_curves
from train.tasks import shown_headlines

PICTURES = 8  # rows of the picture
PARAMETERS = {"trainable M": "trainable", "all M": "total"}  # the columns of results["parameters"]

Models = Mapping[str, tuple[Settings, torch.nn.Module]]

DESCRIPTION = """\
Print the scores of runs in one table and draw their predictions side by side. A RUN is an output folder of
python -m train or python -m train.evaluate. Runs of different protocols or image sets are refused.
Runs that differ in their seed alone are one row, of means and standard deviations; the first of them is in the picture.
OUT receives table.txt, table.md, table.tex, table.csv, curves.png (losses and scores in the course of the runs) and
predictions.png."""


def build_parser() -> Parser:
    parser = Parser("train.compare", DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--baseline", metavar="FILE|NAME", help="Delta_m against a published row, a JSON file or a run")
    add_cache(parser)
    parser.add_argument("--format", choices=FORMATS, default="text", help="in which the table is printed")
    parser.add_argument(
        "--images", metavar="ID,ID", default="", help=f"in the picture (about {PICTURES}, evenly spaced)"
    )
    parser.add_argument("--picture", metavar="NAME", default="predictions.png", help="its file in OUT, .png or .pdf")
    parser.add_argument("--out", metavar="DIR", help=new_folder("runs/compare"))
    return parser


def short_names(given: Sequence[str]) -> list[str]:
    """The last part of each path, preceded by as many parent folders as make the names distinct."""
    parts = [Path(path).resolve().parts for path in given]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"a run is given twice: {', '.join(given)}")


def rows_of(arms: Arms) -> list[list[str]]:
    """The headings, then one row per arm: parameters, each score that any run has, and Delta_m at the end."""
    runs = [results for arm in arms.values() for results in arm.values()]
    columns = [["run", *(name + _augmentation(arm) for name, arm in arms.items())]]
    if any("parameters" in results for results in runs):
        first = [next(iter(arm.values())) for arm in arms.values()]  # seeds do not change them
        columns += [[head, *(_millions(results, key) for results in first)] for head, key in PARAMETERS.items()]
    for task, headline in shown_headlines([results["metrics"] for results in runs]):
        head = f"{task} {headline.key} {'^' if headline.higher_is_better else 'v'}"
        form = ".2f" if headline.unit else ".4f"  # as in all tables of scores
        columns.append(_column(head, arms, partial(_score, task, headline.key), form))
    if any("delta_m" in results for results in runs):
        columns.append(_column("Delta_m % ^", arms, itemgetter("delta_m"), "+.2f"))
    return [list(row) for row in zip(*columns, strict=True)]


def _augmentation(arm: Mapping[str, Results]) -> str:
    given = next(iter(arm.values())).get("tta")
    return f" (tta {given})" if given else ""


def _column(head: str, arms: Arms, value: Callable[[Results], float | None], form: str) -> list[str]:
    return [head, *(mean_and_deviation([value(results) for results in arm.values()], form) for arm in arms.values())]


def _score(task: str, key: str, results: Results) -> float | None:
    return results["metrics"].get(task, {}).get(key)


def _millions(results: Results, key: str) -> str:
    counts = results.get("parameters")
    return f"{counts[key] / 1e6:.2f}" if counts else "n/a"


def encodable(text: str) -> str:
    """Markdown with entities for what stdout cannot encode, such as the arrows on an ASCII terminal."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "xmlcharrefreplace").decode(encoding)


def caption(runs: Mapping[str, Results]) -> str:
    """One line: protocol, image set and, where there are any, odsF and the baseline."""
    first = next(iter(runs.values()))
    over = first["evaluation"]
    images = f"{over['images']} images of {over['split']}"
    lines = [f"protocol {first['protocol']}, labels at {over['compared_at']}, {images}"]
    if odsf := next((results["odsF"] for results in runs.values() if results.get("odsF")), None):
        lines.append(f"odsF over {odsf['images']} images, variant {odsf['variant']}")
    if baseline := first.get("baseline"):
        lines.append(f"Delta_m {describe_baseline(baseline)}")
    return "; ".join(lines)


def load_model(path: Path, results: Results) -> tuple[Settings, torch.nn.Module] | None:
    """(settings, model) of the checkpoint that a run was scored with; None where there is none of that step."""
    folder = checkpoint.find(Path(results.get("checkpoint") or (path if path.is_dir() else path.parent)))
    if "predictions" in results or not (folder / "state.json").is_file():
        return None
    settings, model, state = load_checkpoint(folder)
    return (settings, model) if state.step == results.get("step", results.get("steps")) else None


def picture_name(given: str) -> str:
    """The name of the picture's file; UserError where it is of another kind, or in another folder."""
    if Path(given).name != given or Path(given).suffix.lower() not in (".png", ".pdf"):
        raise UserError(f"--picture {given}: give the name of a file in OUT that ends in .png or .pdf")
    return given


def shown_images(results: Results, models: Models, options: Namespace) -> tuple[DataSet, list[int]]:
    """The data set of the runs and the indices of the images in the picture; UserError for an id that is not there."""
    from train.output import pictures

    settings, _ = next(iter(models.values()))
    given, over = results["dataset"], results["evaluation"]
    source = replace(
        settings.source,
        root=given.get("root", settings.data),
        tasks=tuple(dict.fromkeys(task for s, _ in models.values() for task in s.task_names)),
        size=given["image_size"],
        protocol_name=results["protocol"].partition("@")[0],
        access=Access(
            partial_labels=True, cache=options.cache, val_images=given.get("val_images", settings.val_images)
        ),
        dataset=given["name"],
    )
    dataset = open_dataset(source, over["split"])
    ids = {image_id: index for index, image_id in enumerate(dataset.ids)}
    chosen = [image_id for image_id in options.images.split(",") if image_id]
    if alien := [image_id for image_id in chosen if image_id not in ids]:
        raise UserError(
            f"--images {alien[0]}: {over['split']} has no image of this id: give ids such as {dataset.ids[0]}"
        )
    return dataset, [ids[image_id] for image_id in chosen] or pictures.spread(dataset.groups, PICTURES)


@torch.inference_mode()
def draw(path: Path, dataset: DataSet, indices: Sequence[int], models: Models) -> None:
    """Draws these images, their labels and each model's predictions. Runs share protocol and images."""
    from train.output import pictures

    tasks = tuple(dict.fromkeys(task for settings, _ in models.values() for task in settings.task_names))
    batch = collate([dataset[index, 0] for index in indices], tasks)
    predictions = {name: model.cpu()(batch.images) for name, (_, model) in models.items()}
    pictures.save_predictions(path, batch, predictions, dataset.classes)


def draw_courses(path: Path, given: Mapping[str, Path], protocol: str) -> bool:
    """Draws losses and scores over the steps of those runs, by name, that have a record; whether there are any."""
    folders = {name: run if run.is_dir() else run.parent for name, run in given.items()}
    records = {name: read_record(folder) for name, folder in folders.items() if (folder / NAME).is_file()}
    if records:
        draw_curves(path, records, protocol)
    return bool(records)


def run(options: Namespace) -> None:
    given, picture = options.runs, picture_name(options.picture)
    runs = dict(zip(short_names(given), map(read_results, given), strict=True))
    arms = arms_of(runs)
    require_comparable_arms(arms)
    if options.baseline:
        runs = {name: with_baseline(results, options.baseline) for name, results in runs.items()}
        arms = {name: {run: runs[run] for run in arm} for name, arm in arms.items()}
    paths = dict(zip(runs, map(Path, given), strict=True))
    models = load_models(arms, paths)
    lacking = [name for name, model in models.items() if model is None]
    loaded = {name: model for name, model in models.items() if model is not None}
    shown = None if lacking else shown_images(next(iter(runs.values())), loaded, options)
    tables = [f"table.{suffix}" for suffix, _ in FORMATS.values()]
    out = claim(options.out, "train.compare", [*tables, CURVES, picture], "runs/compare")
    print(write_tables(out, arms, options.format))
    written = [*tables, CURVES] if draw_courses(out / CURVES, paths, next(iter(runs.values()))["protocol"]) else tables
    if shown is None:
        print(f"{out}/: {', '.join(written)}; no picture, as there is no checkpoint of {', '.join(lacking)}")
        return
    draw(out / picture, *shown, loaded)
    print(f"{out}/: {', '.join([*written, picture])}")


def load_models(arms: Arms, paths: Mapping[str, Path]) -> dict[str, tuple[Settings, torch.nn.Module] | None]:
    """The model of the first run of every arm, by the name of the run; None where its checkpoint is gone."""
    first = dict(next(iter(arm.items())) for arm in arms.values())
    return {name: load_model(paths[name], results) for name, results in first.items()}


def write_tables(out: Path, arms: Arms, printed: str) -> str:
    """Writes the table in all formats; returns the ``printed`` one."""
    first = next(iter(arms.values()))
    rows, below = rows_of(arms), caption(first)
    texts = {name: convert(rows, below) for name, (_, convert) in FORMATS.items()}
    for name, (suffix, _) in FORMATS.items():
        write_text(out / f"table.{suffix}", texts[name])
    return encodable(texts[printed]) if printed == "markdown" else texts[printed]


def main(argv: list[str] | None = None) -> int:
    """Compare; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
