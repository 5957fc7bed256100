"""``python -m train.predict CHECKPOINT IMAGE ... --out DIR``: predicts all tasks for any photos, and draws them."""

import sys
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from kernels import UserError
from model import MultiTaskViT
from train.cli import Parser, guarded
from train.config.settings import Settings
from train.datasets.pascal.pascal_mt import PascalMT
from train.datasets.scenes.scenes import Scenes
from train.evaluation.predictions import Picture, to_levels, to_picture, write_pictures
from train.files.reading import reading, require_file
from train.output.tables import make_folder
from train.protocols.protocols import Protocol, build_protocol
from train.protocols.transforms import PadTo
from train.run import checkpoint
from train.run.build import load_checkpoint
from train.tasks.scores import METRICS

SHEET = 24  # photos on the contact sheet

DESCRIPTION = """\
Predict all tasks of a checkpoint for photos of any size and format. A folder stands for the images in it.

OUT receives semseg, human_parts, sal, normals and edge/<name>.png at the photo's size (class ids, 255 times the
probability, 255 (n + 1) / 2), overlays/<task>/<name>.png, raw/<name>.npz (what the heads gave, float16 (channels, h,
w), before it was brought to the photo's size) and sheet.png."""


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m train.predict",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, its 'last' or a folder step-N")
    parser.add_argument("images", metavar="IMAGE|FOLDER", nargs="+")
    parser.add_argument("--out", metavar="DIR", default="runs/predict", help="(%(default)s)")
    return parser


def list_photos(given: Sequence[str]) -> dict[str, Path]:
    """{name: path} of the images named and of those in the folders named, whose other files one line on stderr tells.

    A photo's name is its file's without the suffix, with it where two differ in it alone. UserError for a file that is
    named and no image, and where no image is left.
    """
    paths, others = [], []
    for path in map(Path, given):
        if not path.is_dir():
            open_head(path)
            paths.append(path)
            continue
        for file in sorted(file for file in path.iterdir() if file.is_file()):
            try:
                open_head(file)
                paths.append(file)
            except UserError:
                others.append(file)
    if not paths:
        raise UserError(f"{', '.join(given)}: no image is there; name photos, or a folder that holds some")
    if others:
        print(f"skipped {len(others)} files that are no images, the first: {others[0]}", file=sys.stderr)
    stems = Counter(path.stem for path in paths)
    named: dict[str, Path] = {}
    for path in paths:
        name = path.stem if stems[path.stem] == 1 else path.name
        if name in named:
            raise UserError(f"{named[name]} and {path} have the same name: predict them into folders of their own")
        named[name] = path
    return named


def open_head(path: Path) -> None:
    """UserError where Pillow does not take ``path`` for an image."""
    require_file(path)
    with reading(path), Image.open(path):
        pass


def read_any_photo(path: Path) -> NDArray[np.uint8]:
    """RGB (H, W, 3), the right way up: grey and 16 bits become colours of 8, what is transparent becomes white."""
    with reading(path), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))


def to_model(photo: NDArray[np.uint8], protocol: Protocol) -> tuple[NDArray[np.uint8], tuple[slice, slice]]:
    """(the photo as the model gets it, (size, size, 3), where in it the photo is).

    A photo that is larger than the padding of ``invpt`` is made to fit.
    """
    first, size = protocol.val[0], protocol.size
    where = (slice(0, size), slice(0, size))
    if isinstance(first, PadTo):
        sides = np.array(photo.shape[:2])
        if (scale := size / sides.max()) < 1:
            sides = np.maximum(np.rint(scale * sides).astype(int), 1)
            photo = cv2.resize(photo, tuple(map(int, sides[::-1])), interpolation=cv2.INTER_AREA)
        where = tuple(slice((size - int(side)) // 2, (size - int(side)) // 2 + int(side)) for side in sides)
    return first({"image": photo}, np.random.default_rng())["image"], where


@torch.inference_mode()
def predict(model: MultiTaskViT, photo: NDArray[np.uint8], protocol: Protocol) -> dict[str, NDArray[np.float32]]:
    """What the heads give, (channels, h, w), where the photo is."""
    image, where = to_model(photo, protocol)
    outputs = model(torch.tensor(image, device=model.task_embed.device).permute(2, 0, 1)[None])
    return {task: output[0][:, where[0], where[1]].float().cpu().numpy() for task, output in outputs.items()}


def to_photo(task: str, output: NDArray[np.float32], shape: tuple[int, int]) -> Picture:
    """The PNG at the photo's size. Outputs are brought to it before anything is decided, so that borders are smooth."""
    if task in ("seg", "parts"):
        return _largest(output, shape)
    resized = np.stack([_resize(channel, shape) for channel in output])
    decided = METRICS[task].decide(torch.from_numpy(resized)[None])[0]
    return to_picture(task, to_levels(task, decided), rounded=True)


def _largest(logits: NDArray[np.float32], shape: tuple[int, int]) -> Picture:
    """argmax over channels; a large photo does not fit into memory once per class."""
    best, ids = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.uint8)
    for i, channel in enumerate(logits):
        resized = _resize(channel, shape)
        ids[resized > best] = i
        np.maximum(best, resized, out=best)
    return ids


def _resize(channel: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    return cv2.resize(channel, shape[::-1], interpolation=cv2.INTER_LINEAR)


def write(out: Path, name: str, photo: Picture, outputs: dict[str, NDArray[np.float32]]) -> dict[str, Picture]:
    """All files of one photo; returns its overlays."""
    from train.output import pictures

    predicted = {task: to_photo(task, output, photo.shape[:2]) for task, output in outputs.items()}
    overlays = {task: pictures.overlay(task, photo, picture) for task, picture in predicted.items()}
    write_pictures(out, name, predicted)
    write_pictures(out / "overlays", name, overlays)
    make_folder(out / "raw")
    partial = out / "raw" / f".{name}.partial"
    with partial.open("wb") as file:
        np.savez_compressed(file, **{task: output.astype(np.float16) for task, output in outputs.items()})
    partial.replace(out / "raw" / f"{name}.npz")
    return overlays


def protocol_of(settings: Settings) -> Protocol:
    """The run's; rendered scenes have none, ``mini`` shrinks a photo to their size."""
    return build_protocol(settings.protocol if settings.data else "mini", settings.image_size)


def run(given: Sequence[str], checkpoint_path: str, out: Path) -> None:
    from train.output import pictures

    photos = list_photos(given)
    settings, model, state = load_checkpoint(checkpoint.find(Path(checkpoint_path)))
    protocol, classes = protocol_of(settings), (PascalMT if settings.data else Scenes).classes
    make_folder(out)
    print(f"model     {settings.model} of step {state['step']}: {', '.join(model.tasks)}, protocol {protocol.reported}")
    shown = {name: photo for i, (name, photo) in enumerate(photos.items()) if i < SHEET}
    sheet = {}
    for name, path in tqdm(photos.items(), "predict", leave=False, disable=None):
        photo = read_any_photo(path)
        overlays = write(out, name, photo, predict(model, photo, protocol))
        if name in shown:
            sheet[name] = {"image": photo} | overlays
    pictures.save_contact_sheet(out / "sheet.png", sheet, classes)
    print(f"{out}/: {len(photos)} photos: PNGs by task, overlays, raw, sheet.png")


def main(argv: list[str] | None = None) -> int:
    """Predict; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options.images, options.checkpoint, Path(options.out)))


if __name__ == "__main__":
    sys.exit(main())
