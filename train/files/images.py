"""Reads and checks image files: photos of any camera, and PNGs of labels and predictions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from kernels.errors import UserError
from train.files.reading import reading, require_file

# Of photos, by their content; JPEG includes MPO. All are decoded in this process: Pillow gives PostScript, for one, to
# another program.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation

# Phones make photos of 200 megapixels; a small file that decodes to more than this is refused.
Image.MAX_IMAGE_PIXELS = 2**28


def read_image(path: Path, modes: Sequence[str]) -> Image.Image:
    """The decoded PNG, in one of Pillow's ``modes``; UserError where it has another mode or is damaged."""
    require_file(path)
    with reading(path):
        with Image.open(path, formats=("PNG",)) as image:
            cut = ";16" in str(image.tile) and ";16" not in image.mode  # Pillow reads 16-bit colour as 8-bit RGB
            if image.mode not in modes or cut:
                bits = 16 if all(";16" in mode for mode in modes) else 8
                expected = " or ".join(modes)
                raise UserError(f"{path} has Pillow's mode {image.mode}, not {bits} bits of {expected}: restore it")
            image.load()
        _check_sums(path)
        return image


def read_photo(path: Path) -> NDArray[np.uint8]:
    """8-bit RGB (H, W, 3), oriented by EXIF. Grey, 16-bit and float images are converted; transparency becomes white.

    This is the one reader of photos: what it takes can be checked, trained on, scored and predicted."""
    with _photo(path) as stored:
        stored.load()
        if stored.format == "PNG":
            _check_sums(path)
        turn = TURNS.get(_orientation(stored))
        image = _eight_bits(path, stored)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(image if turn is None else image.transpose(turn))


def image_shape(path: Path) -> tuple[int, int]:
    """(height, width) of :func:`read_photo`, from the header of the file."""
    with _photo(path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


@contextmanager
def _photo(path: Path) -> Iterator[Image.Image]:
    """An opened photo. Pillow's warnings on its metadata are ignored: the pixels may be sound."""
    require_file(path)
    with reading(path, ignored=(UserWarning,)), Image.open(path, formats=FORMATS) as image:
        yield image


def _check_sums(path: Path) -> None:
    """Raises where a checksum of a PNG is wrong, which decoding does not check."""
    with Image.open(path, formats=("PNG",)) as image:
        image.verify()


def _orientation(image: Image.Image) -> int:
    """EXIF's; 1, upright, where its metadata is damaged, and for TIFF, which Pillow turns by itself."""
    with suppress(Exception):  # Pillow raises anything on odd metadata
        found = image.getexif().get(ExifTags.Base.Orientation)
        if image.format != "TIFF" and isinstance(found, int):
            return found
    return 1


def _eight_bits(path: Path, image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel: grey of 16 bits, or of floats in 0..1, is scaled. UserError for values of which
    white is unknown."""
    if image.mode[0] not in "IF":
        return image
    values, white = np.asarray(image), 1 if image.mode == "F" else 65535
    if image.mode == "I" and image.format == "TIFF" or not ((values >= 0) & (values <= white)).all():
        raise UserError(f"{path} holds floats outside 0..1, or integers of 32 bits: convert it to 8 or 16 bits")
    return Image.fromarray((values / (white / 255)).astype(np.uint8))
