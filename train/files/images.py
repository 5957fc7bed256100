"""Images on disk, each checked before it counts."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from kernels.errors import UserError
from train.files.reading import reading, require_file


def read_image(path: Path, modes: Sequence[str], formats: tuple[str, ...] = ("PNG",)) -> Image.Image:
    """The whole image, one of Pillow's ``modes`` with 8 bits a sample; UserError where it is another or damaged."""
    require_file(path)
    with reading(path):
        with Image.open(path, formats=formats) as image:
            cut = ";16" in str(image.tile) and ";16" not in image.mode  # colours of 16 bits come as RGB of 8
            if image.mode not in modes or cut:
                bits = 16 if all(";16" in mode for mode in modes) else 8
                expected = " or ".join(modes)
                raise UserError(f"{path} has Pillow's mode {image.mode}, not {bits} bits of {expected}: restore it")
            image.load()
        with Image.open(path, formats=formats) as checked:
            checked.verify()  # the checksums of a PNG, which decoding leaves alone
        return image


def image_shape(path: Path) -> tuple[int, int]:
    """(height, width), read from the head of the file."""
    require_file(path)
    with reading(path), Image.open(path) as image:
        return image.size[::-1]
