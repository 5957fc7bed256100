"""``python -m train.evaluate CHECKPOINT --data PASCAL_MT``: scores a checkpoint, or the predictions of any program."""

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kernels import UserError
from model import MultiTaskModel
from train.cli import Parser, add_cache, add_tta, add_val_images, guarded, new_folder
from train.config.settings import Settings, layer
from train.datasets.base import CLASSES, DataSet, Source, kind_of, open_dataset, open_tree
from train.datasets.batches import sample_loader
from train.evaluation.augmented import AugmentedModel, augment
from train.evaluation.baselines import describe_delta, with_baseline
from train.evaluation.predictions import NOTE, keeping, predicted_tasks, read_note, require_predictions, shorten
from train.evaluation.results import Results, describe_set
from train.evaluation.score import (
    Predicted,
    Scoring,
    choose_boundaries,
    predictions_of_files,
    predictions_of_model,
    score_predictions,
)
from train.files.atomic import write_json
from train.files.folders import claim
from train.files.reading import reading, require_file
from train.metrics.odsf import VARIANTS
from train.output.scores import score_table
from train.output.versions import versions
from train.protocols import PROTOCOLS, Rendered
from train.run import checkpoint
from train.run.build import kernel_of, load_checkpoint
from train.run.start import count_parameters
from train.tasks import build_metrics, parse_tasks

DESCRIPTION = """\
Score a checkpoint, or with --predictions the prediction files of any program, by one protocol.

CHECKPOINT is a run's folder, its 'last' or 'best', or a folder step-N. Without --data it is scored on the data that it
was trained on, which may be the rendered scenes. Predictions are semseg/<id>.png and human_parts/<id>.png (class ids),
sal/<id>.png and edge/<id>.png (255 times the probability), normals/<id>.png (255 (n + 1) / 2), at the photo's size.
OUT receives results.json."""


@dataclass(frozen=True)
class Subject:
    """What is scored: ``model`` or, where it is None, a folder of predictions; ``about`` identifies it in results.

    ``settings`` are those of the evaluation. ``trained`` says what trained a model and how it computes here."""

    name: str
    about: dict[str, Any]
    settings: Settings
    model: MultiTaskModel | AugmentedModel | None = None
    trained: dict[str, Any] = field(default_factory=dict)


def build_parser() -> Parser:
    parser = Parser("train.evaluate", DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT")
    add("--predictions", metavar="DIR", help="score the prediction files in DIR instead of a checkpoint")
    add("--tasks", metavar="A,B", help="score only these tasks (all that were predicted)")
    add("--data", metavar="DIR", help="a tree of PASCAL-Context, NYUD-v2 or Cityscapes, or the folder around it")
    add_val_images(parser)
    add("--protocol", choices=PROTOCOLS, help="how images, predictions and labels are processed (the run's)")
    add(
        "--split",
        metavar="NAME",
        default="val",
        help="name of a list of images, or of a folder of Cityscapes (%(default)s)",
    )
    add("--ids", metavar="FILE", help="score only the images of the split whose ids FILE lists, one per line")
    add("--odsf", choices=("fast", "full", "off"), help="compute odsF of edges over 100 images, all or none (fast)")
    add(
        "--odsf-variant",
        choices=VARIANTS,
        default="seism",
        help="%(default)s: SEISM, with NMS; none: Multi-Task-Learning-PyTorch, without NMS; iz: MTDP",
    )
    add_tta(parser)
    add("--save-predictions", metavar="DIR", help="write all predictions to DIR")
    add("--baseline", metavar="FILE|NAME", help="print Delta_m against a published row, a JSON file or a run")
    add("--partial-labels", action="store_true", help="a missing label file means void for that task")
    add("--skip-bad", action="store_true", help="skip images with a damaged or missing file")
    add_cache(parser)
    add("--workers", type=int, metavar="N", default=os.cpu_count(), help="number of processes for odsF (%(default)s)")
    add("--out", metavar="DIR", help=new_folder("runs/evaluate/NAME-PROTOCOL"))
    return parser


def subject_of(options: Namespace) -> Subject:
    if (options.checkpoint is None) == (options.predictions is None):
        raise UserError("give either a CHECKPOINT or --predictions DIR")
    return _from_files(options) if options.predictions else _from_checkpoint(options)


def _from_checkpoint(options: Namespace) -> Subject:
    folder = checkpoint.find(Path(options.checkpoint))
    settings, model, state = load_checkpoint(folder)
    tasks = ",".join(chosen_tasks(options.tasks, model.tasks, str(folder)))
    changes = {"data": options.data or settings.data, "protocol": options.protocol or settings.protocol, "tasks": tasks}
    if options.protocol and not changes["data"]:
        raise UserError("--protocol applies to photos, and rendered scenes have none: give --data")
    protocol = PROTOCOLS[changes["protocol"]]
    if kind := kind_of(changes["data"]):
        _require_same_classes(folder, settings, parse_tasks(tasks), kind.name)
        changes["dataset"] = kind.name
    if options.protocol not in (None, settings.protocol):
        # An input of another shape or, where photos are not resized, one that holds them: the position embedding is
        # resampled.
        least = settings.image_size if protocol.resizes_photos else max(settings.image_size, protocol.own_size)
        unit = protocol.aspect[0] * model.patch  # of the height: the width, too, is then a whole number of patches
        changes["image_size"] = -(-least // unit) * unit
    about = {"checkpoint": str(folder), "step": state.step} | ({"tta": options.tta} if options.tta else {})
    trained = {
        "commands": state.commands,
        "settings": state.settings,
        "kernel": kernel_of(settings, model.device),
        "device": model.device.type,
        "precision": "fp32",  # whatever it was trained in
        "parameters": dict(zip(("total", "trainable"), count_parameters(model), strict=True)),
    }
    settings = with_flags(settings, options, changes)
    augmented = augment(model, options.tta, settings.image_shape)
    return Subject(folder.parent.name, about, settings, augmented, trained)


def _require_same_classes(folder: Path, trained: Settings, tasks: Sequence[str], dataset: str) -> None:
    """UserError where a model's classes of a task are not those of ``dataset``."""
    own, theirs = trained.source.classes, CLASSES[dataset]
    name = "rendered scenes" if trained.source.rendered else trained.source.dataset_name
    if other := [task for task in tasks if own.get(task) != theirs.get(task)]:
        raise UserError(
            f"{folder} was trained on the classes of {name} for {other[0]}, which {dataset} does not have: drop "
            "--data, or choose other --tasks"
        )


def _from_files(options: Namespace) -> Subject:
    folder, note = Path(options.predictions), read_note(Path(options.predictions))
    if options.tta:
        raise UserError("--tta needs a model, and --predictions are files: give a CHECKPOINT instead")
    if (split := note.get("split", options.split)) != options.split:
        raise UserError(f"{folder} holds predictions of split {split!r}: pass --split {split}")
    settings = Settings(tasks=",".join(chosen_tasks(options.tasks, predicted_tasks(folder), str(folder))))
    if options.data:
        changes = {"data": options.data} | _protocol_of_files(options.protocol or note.get("protocol", ""), note)
    elif note.get("protocol") == Rendered.name:
        names = ("image_size", "scenes", "val_scenes", "seed")
        changes = layer({name: note[name] for name in names if name in note}, str(folder / NOTE)) | {"data": ""}
    else:
        raise UserError("--predictions are scored with the labels of a tree: give --data")
    about = {"predictions": str(folder)} | ({"tta": note["tta"]} if "tta" in note else {})
    return Subject(folder.resolve().name, about, with_flags(settings, options, changes))


def _protocol_of_files(name: str, note: dict[str, Any]) -> dict[str, Any]:
    """The settings of protocol ``name``, with the size in ``note`` if the note has this protocol, else the default."""
    if name not in PROTOCOLS:
        raise UserError(f"say by which protocol these predictions are scored: --protocol {', '.join(PROTOCOLS)}")
    size = note.get("image_size") if note.get("protocol") == name else None
    return {"protocol": name, "image_size": size or PROTOCOLS[name].own_size}


def chosen_tasks(given: str | None, there: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The tasks to score: ``given``, or all of ``there``. UserError for a given task that is not in ``there``."""
    chosen = parse_tasks(given) if given else there
    if lacking := [task for task in chosen if task not in there]:
        raise UserError(f"{where} has no predictions of {', '.join(lacking)}: choose --tasks among {', '.join(there)}")
    return chosen


def with_flags(settings: Settings, options: Namespace, changes: dict[str, Any]) -> Settings:
    partial, skip, val_images = options.partial_labels, options.skip_bad, options.val_images
    if settings.data == changes["data"]:  # the same tree as in training: use the run's flags too
        partial, skip = partial or settings.partial_labels, skip or settings.skip_bad
        val_images = val_images or settings.val_images
    reading = {"partial_labels": partial, "skip_bad": skip, "cache": options.cache or settings.cache}
    reading["val_images"] = val_images
    return replace(settings, workers=options.workers, **reading, **changes)


def build_set(settings: Settings, options: Namespace) -> DataSet:
    """The data set to score."""
    source = settings.source
    if source.rendered and (options.ids or options.odsf in ("fast", "full")):
        raise UserError("rendered scenes have neither ids for --ids nor LabelMaps for --odsf: give --data")
    only = read_ids(Path(options.ids), source, options.split) if options.ids else None
    dataset = open_dataset(source, options.split, scoring=True, only=only)
    if not len(dataset):
        raise UserError(f"no image of split {options.split!r} in {options.ids} is labelled: name others with --ids")
    return dataset


def read_ids(path: Path, source: Source, split: str) -> frozenset[str]:
    """The ids in a file, one per line; UserError for an id that the split does not list."""
    require_file(path)
    with reading(path):
        ids = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    tree = open_tree(source.root, source.access.val_images)
    if alien := sorted(set(ids).difference(tree.ids(split))):
        raise UserError(
            f"{path} names {len(alien)} of {len(ids)} images that split {split!r} does not list, {shorten(alien)}: "
            "name another --split, or correct the file"
        )
    if not ids:
        raise UserError(f"{path} names no image: give ids such as {tree.example}, one per line")
    return frozenset(ids)


def evaluate(subject: Subject, options: Namespace) -> tuple[Results, Path]:
    """(the content of results.json, the folder to write it to)."""
    settings = subject.settings
    dataset = build_set(settings, options)
    boundaries = choose_boundaries(dataset, options.odsf or "fast")
    results = describe(subject, options, dataset, len(boundaries))
    if options.baseline:
        with_baseline(results, options.baseline)  # a wrong baseline fails here, not after hours of scoring
    predicted = predictions_of(subject, options, dataset)
    metrics = build_metrics(settings.task_names, dataset.classes)
    kept = Path(options.save_predictions) if options.save_predictions else None
    with keeping(kept, describe_files(settings, dataset, options.split) | subject.about) as save:
        default = f"runs/evaluate/{subject.name}-{dataset.protocol.reported}"
        out = claim(options.out, "train.evaluate", ["results.json"], default)
        print(announce(results), flush=True)
        scoring = Scoring(predicted, dataset.ids, metrics, boundaries, save, dataset.boundary_distance)
        results["metrics"] = score_predictions(scoring, options.odsf_variant, options.workers)
    return with_baseline(results, options.baseline) if options.baseline else results, out


def describe_files(settings: Settings, dataset: DataSet, split: str) -> dict[str, Any]:
    """The note saved with a folder of predictions, from which it can be scored later."""
    note = {"protocol": dataset.protocol.name, "image_size": settings.image_size, "split": split}
    if settings.source.rendered:
        note |= {"scenes": settings.scenes, "val_scenes": settings.val_scenes, "seed": settings.seed}
    return note


def predictions_of(subject: Subject, options: Namespace, dataset: DataSet) -> Iterator[Predicted]:
    """The predictions; UserError where a file of them is missing."""
    samples = sample_loader(dataset, subject.settings.batch_size, min(options.workers, 1))
    if subject.model:
        every = bool(options.save_predictions)
        return predictions_of_model(subject.model, subject.settings.task_names, samples, dataset.protocol, every)
    folder = Path(options.predictions)
    for task in subject.settings.task_names:
        require_predictions(folder, task, dataset.with_label(task), options.split)
    return predictions_of_files(folder, dataset, samples, dataset.protocol)


def describe(subject: Subject, options: Namespace, dataset: DataSet, boundaries: int) -> Results:
    """The content of results.json, without the scores."""
    thresholds = len(VARIANTS[options.odsf_variant].thresholds)
    odsf = {"mode": options.odsf or "fast", "variant": options.odsf_variant, "thresholds": thresholds}
    return {
        "format": 1,
        "command": shlex.join(["python", "-m", "train.evaluate", *sys.argv[1:]]),
        "protocol": dataset.protocol.reported,
        **subject.about,
        **subject.trained,
        "dataset": {
            "name": dataset.name,
            "root": subject.settings.data,
            "val_images": subject.settings.val_images,
            "image_size": subject.settings.image_size,
        },
        "evaluation": describe_set(
            dataset,
            subject.settings.task_names,
            options.split,
            dataset.protocol.resolution,
            options.ids and Path(options.ids).name,
        ),
        "odsF": odsf | {"images": boundaries} if boundaries else None,
        "metrics": {},
        "versions": versions(),
    }


def announce(results: Results) -> str:
    over = results["evaluation"]
    listed = f", those in {over['set']}" if over["set"] else ""
    skipped = f", {over['skipped']} skipped" if over["skipped"] else ""
    scored = results.get("checkpoint") or results["predictions"]
    return "\n".join(
        [
            f"scored    {scored}",
            f"images    {over['images']} of {results['dataset']['name']} {over['split']}{listed}{skipped}",
            f"protocol  {results['protocol']}, predictions are scored at {over['compared_at']}",
            *([f"tta       {results['tta']}: predictions are means over copies"] if "tta" in results else []),
        ]
    )


def summary(results: Results) -> str:
    """The score table, odsF with its images and variant, and Delta_m."""
    title = f"tta {results['tta']}" if "tta" in results else "score"
    lines = [score_table({title: results["metrics"]})]
    if odsf := results["odsF"]:
        scores = results["metrics"]["edge"]
        values = ", ".join(f"{key} {scores[key]:.2f}" for key in ("odsF", "oisF", "AP", "threshold") if scores[key])
        lines.append(
            f"edges     {values}; {odsf['images']} images, variant {odsf['variant']}, {odsf['thresholds']} thresholds"
        )
    if "baseline" in results:
        lines.append(f"Delta_m   {describe_delta(results)}")
    return "\n".join(lines)


def run(options: Namespace) -> None:
    """Evaluates, writes results.json and prints the table."""
    if options.workers < 0:
        raise UserError(f"workers is {options.workers}: it must not be negative")
    results, out = evaluate(subject_of(options), options)
    write_json(out / "results.json", results)
    print(f"\n{summary(results)}\n\n{out}/results.json")


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
