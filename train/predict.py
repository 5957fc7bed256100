"""``python -m train.predict CHECKPOINT IMAGE ... --out DIR``: predicts all tasks for any photos, and draws them."""

import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import UserError
from model import ExportedModel, MultiTaskModel
from train.cli import Parser, add_tta, guarded, new_folder
from train.config.settings import Settings
from train.evaluation.augmented import AugmentedModel, augment
from train.evaluation.predictions import write_pictures
from train.evaluation.validate import require_finite
from train.files.atomic import make_folder, replacing
from train.files.folders import claim, resolved, walk_files
from train.files.images import FORMATS, image_shape, read_photo
from train.files.printing import printable
from train.files.progress import progress
from train.protocols import Protocol
from train.run import checkpoint
from train.run.build import load_checkpoint, load_exported
from train.tasks import TASKS

Model = MultiTaskModel | ExportedModel | AugmentedModel

SHEET = 24  # photos on the contact sheet

DESCRIPTION = f"""\
Predict all tasks of a checkpoint for photos of any size ({", ".join(FORMATS)}). A folder means all images in
it and in its sub-folders, which the files of OUT keep.

OUT receives semseg, human_parts, sal, normals and edge/<name>.png at the photo's size (class ids, 255 times the
probability, 255 (n + 1) / 2), overlays/<task>/<name>.png, raw/<name>.npz (raw outputs of the heads, float16 (channels,
h, w), at the model's resolution) and sheet.png.
Exit status: 0, 1 some photos could not be read, 2 a user's mistake."""


def build_parser() -> Parser:
    usage = "python -m train.predict (CHECKPOINT | --exported FILE) IMAGE|FOLDER ... [--out DIR]"
    parser = Parser("train.predict", DESCRIPTION, usage=usage)
    parser.add_argument(
        "inputs",
        metavar="CHECKPOINT IMAGE|FOLDER",
        nargs="+",
        help="CHECKPOINT is a run's folder, its 'last' or 'best', a folder step-N or one of train.export",
    )
    parser.add_argument(
        "--exported",
        metavar="FILE",
        help="a .pt2 file of train.export instead of CHECKPOINT; it can run any code: use only what you trust",
    )
    add_tta(parser)
    parser.add_argument("--out", metavar="DIR", help=new_folder("runs/predict"))
    return parser


def list_photos(given: Sequence[str]) -> dict[str, Path]:
    """{name: path} of the given images and of the images in the given folders and their sub-folders.

    Other files in these folders are skipped; one line on stderr says how many. A photo's name is its file name, after
    the sub-folders it is in, without the suffix, or with it where two photos share the name without it. UserError for a
    given file that is not an image, and if there is no image at all.
    """
    found, others = [], []  # pairs (path below the given folder, path)
    for path in map(Path, given):
        for file in walk_files(path) if path.is_dir() else (path,):
            try:
                image_shape(file)
                found.append((file.relative_to(path) if path.is_dir() else Path(file.name), file))
            except UserError:
                if file == path:
                    raise
                others.append(file)
    if not found:
        raise UserError(f"{', '.join(given)}: no image is there; name photos, or a folder that holds some")
    if others:
        first = printable(str(others[0]))
        print(f"skipped {len(others)} files that are not images, the first: {first}", file=sys.stderr)
    stems = Counter(below.with_suffix("") for below, _ in found)
    named: dict[str, Path] = {}
    for below, path in found:
        short = below.with_suffix("")
        name = (short if stems[short] == 1 else below).as_posix()
        if name in named:
            raise UserError(f"{named[name]} and {path} have the same name: predict them into separate folders")
        if len(os.fsencode(Path(name).name)) > 255 - len(".png"):
            raise UserError(f"{path}: its name is too long for {name}.png: rename it")
        named[name] = path
    return named


@torch.inference_mode()
def predict(model: Model, path: Path, protocol: Protocol) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]:
    """(the photo, the raw output of each head, (channels, h, w), without the padding around the photo). UserError where
    the photo cannot be read, or an output is not finite."""
    photo = read_photo(path)
    image, where = protocol.fit_photo(photo)
    outputs = model(torch.tensor(image, device=model.device).permute(2, 0, 1)[None])
    require_finite(outputs, str(path))
    return photo, {task: output[0][:, where[0], where[1]].float().cpu().numpy() for task, output in outputs.items()}


def write(
    out: Path, name: str, photo: NDArray[np.uint8], outputs: dict[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.uint8]]:
    """All files of one photo, task by task; returns thumbnails of the photo and its overlays."""
    from train.output.pictures import thumbnail

    shown = {"image": thumbnail(photo)}
    for task, output in outputs.items():
        picture = TASKS[task].at_photo(output, photo.shape[:2])
        overlay = TASKS[task].overlay(photo, picture)
        write_pictures(out, name, {task: picture})
        write_pictures(out / "overlays", name, {task: overlay})
        shown[task] = thumbnail(overlay)
    path = out / "raw" / f"{name}.npz"
    make_folder(path.parent)
    with replacing(path, sync=False) as partial, partial.open("wb") as file:
        raw: dict[str, Any] = {task: output.astype(np.float16) for task, output in outputs.items()}
        np.savez_compressed(file, **raw)
    return shown


def load(options: Namespace) -> tuple[Settings, Model, int]:
    """(settings, model, step) of the checkpoint or the exported file."""
    if options.exported:
        settings, exported, step = load_exported(Path(options.exported))
        return settings, augment(exported, options.tta, settings.image_shape), step
    settings, model, state = load_checkpoint(checkpoint.find(Path(options.inputs[0])))
    return settings, augment(model, options.tta, settings.image_shape), state.step


def run(options: Namespace) -> int:
    """Predicts all photos that can be read; the exit status is 1 if there are others."""
    from train.output import pictures

    given = options.inputs if options.exported else options.inputs[1:]
    if not given:
        raise UserError(f"give photos after {options.inputs[0]}")
    photos = list_photos(given)
    settings, model, step = load(options)
    source = resolved(Path(options.exported or options.inputs[0]))
    protocol, classes = settings.source.protocol, settings.source.classes
    names = (*(TASKS[task].folder for task in model.tasks), "overlays", "raw", "sheet.png")
    # Photos of two checkpoints in one folder could not be told apart.
    tta = f" with --tta {options.tta}" if options.tta else ""
    out = claim(options.out, f"train.predict of step {step} of {source}{tta}", names, "runs/predict")
    print(f"model     {settings.model} of step {step}: {', '.join(model.tasks)}, protocol {protocol.reported}{tta}")
    sheet: dict[str, dict[str, NDArray[np.uint8]]] = {}
    faults: list[str] = []
    for name, path in progress(photos.items(), "predict", len(photos)):
        try:
            photo, outputs = predict(model, path, protocol)
        except UserError as error:
            faults.append(str(error))
            continue
        shown = write(out, name, photo, outputs)
        if len(sheet) < SHEET:
            sheet[name] = shown
    if not sheet:
        raise UserError(faults[0] if len(faults) == 1 else f"none of {len(faults)} photos can be read: {faults[0]}")
    for fault in faults:
        print(f"left out: {printable(fault)}", file=sys.stderr)
    pictures.save_contact_sheet(out / "sheet.png", sheet, classes)
    left_out = f", {len(faults)} left out" if faults else ""
    print(f"{out}/: {len(photos) - len(faults)} photos{left_out}: PNGs by task, overlays, raw, sheet.png")
    return 1 if faults else 0


def main(argv: list[str] | None = None) -> int:
    """Predict; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
