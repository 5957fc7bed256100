"""Reads and checks image files."""

from collections.abc import Sequence
from pathlib import Path

from PIL import ExifTags, Image

from kernels.errors import UserError
from train.files.reading import reading, require_file


def read_image(path: Path, modes: Sequence[str], formats: tuple[str, ...] = ("PNG",)) -> Image.Image:
    """The decoded image, in one of Pillow's ``modes``; UserError where it has another mode or is damaged."""
    require_file(path)
    with reading(path):
        with Image.open(path, formats=formats) as image:
            cut = ";16" in str(image.tile) and ";16" not in image.mode  # Pillow reads 16-bit colour as 8-bit RGB
            if image.mode not in modes or cut:
                bits = 16 if all(";16" in mode for mode in modes) else 8
                expected = " or ".join(modes)
                raise UserError(f"{path} has Pillow's mode {image.mode}, not {bits} bits of {expected}: restore it")
            image.load()
        with Image.open(path, formats=formats) as checked:
            checked.verify()  # the checksums of a PNG, which decoding does not check
        return image


def image_shape(path: Path) -> tuple[int, int]:
    """(height, width) as oriented by EXIF, read from the header of the file."""
    require_file(path)
    with reading(path), Image.open(path) as image:
        width, height = image.size
        lies = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (width, height) if lies else (height, width)
