"""Images are read whole and in the mode that is asked for, or refused in one line; photos as cameras make them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from kernels.errors import UserError
from train.files.images import FORMATS, image_shape, read_image, read_photo

ORIENTATION = 0x0112


def test_sixteen_bits_of_grey_are_read_where_they_are_asked_for(tmp_path):
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 12_345
    Image.fromarray(values).save(tmp_path / "deep.png")
    read = np.asarray(read_image(tmp_path / "deep.png", ("I;16",)))
    assert read.dtype == np.uint16 and np.array_equal(read, values) and image_shape(tmp_path / "deep.png") == (2, 3)
    with pytest.raises(UserError, match="has Pillow's mode I;16, not 8 bits of L"):
        read_image(tmp_path / "deep.png", ("L",))


def test_eight_bits_are_no_sixteen(tmp_path):
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(UserError, match="has Pillow's mode L, not 16 bits of I;16"):
        read_image(tmp_path / "flat.png", ("I;16",))


def jpeg(marker, content):
    """A sound JPEG of 64 x 48 pixels, with one more segment of metadata."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "JPEG")
    sound = file.getvalue()
    return sound[:2] + marker + struct.pack(">H", 2 + len(content)) + content + sound[2:]


def exif(tag, kind, count, value):
    return b"Exif\0\0II*\0" + struct.pack("<LHHHL", 8, 1, tag, kind, count) + value + bytes(4)


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (b"\xff\xe1", b"Exif\0\0II*\0" + struct.pack("<LH", 8, 50) + b"1234"),
        (b"\xff\xe1", exif(0x10F, 2, 40, struct.pack("<L", 5000))),
        (b"\xff\xe1", exif(ORIENTATION, 3, 2, struct.pack("<HH", 1, 1))),
        (b"\xff\xe1", exif(ORIENTATION, 2, 4, b"six\0")),
        (b"\xff\xe1", b"Exif\0\0neither order"),
        (b"\xff\xe2", b"MPF\0II*\0\x08\0\0\0\0\0"),
    ],
    ids=["EXIF that ends early", "a tag beyond the end", "two orientations", "a word", "no EXIF", "malformed MPO"],
)
def test_odd_metadata_does_not_make_sound_pixels_unreadable(marker, content, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(jpeg(marker, content))
    photo = read_photo(tmp_path / "photo.jpg")
    assert photo.shape == (48, 64, 3) and image_shape(tmp_path / "photo.jpg") == (48, 64)
    assert (photo == photo[0, 0]).all() and photo[0, 0, 0] > 250


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", FORMATS)
def test_a_photo_has_the_orientation_that_the_camera_noted(format, orientation, tmp_path):
    """Its labels have that orientation too. BMP, GIF and PPM note none; 0 and 9 mean nothing."""
    noted, path = Image.Exif(), tmp_path / "photo"
    noted[ORIENTATION] = orientation
    Image.effect_noise((40, 24), 90).convert("RGB").save(path, format, exif=noted)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_photo(path), upright)
    assert image_shape(path) == upright.shape[:2]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_photos_may_have_any_colours(mode, format, tmp_path):
    """Whatever their names are."""
    if mode == "P" and format == "JPEG":
        format = "PNG"
    Image.effect_noise((9, 8), 90).convert(mode).save(tmp_path / "photo.jpg", format)
    with Image.open(tmp_path / "photo.jpg") as image:
        np.testing.assert_array_equal(read_photo(tmp_path / "photo.jpg"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_deep_grey_keeps_its_brightness(dtype, tmp_path):
    grey, path = np.linspace(0, 1, 256).reshape(8, 32), tmp_path / "photo.tif"
    Image.fromarray((grey * (1 if dtype == np.float32 else 65535)).astype(dtype)).save(path)
    assert np.abs(read_photo(path) - 255 * grey[..., None]).max() <= 1


@pytest.mark.parametrize("value", [200.0, -1.0, np.nan])
def test_floats_whose_white_is_unknown_are_refused(value, tmp_path):
    Image.fromarray(np.full((4, 5), value, np.float32)).save(tmp_path / "photo.tif")
    with pytest.raises(UserError, match="holds floats outside 0..1"):
        read_photo(tmp_path / "photo.tif")


def test_photos_of_phones_are_not_too_large(tmp_path):
    """108 megapixels."""
    Image.new("L", (12_000, 9_000), 90).save(tmp_path / "phone.jpg", quality=50)
    assert read_photo(tmp_path / "phone.jpg").shape == (9_000, 12_000, 3)


def test_no_other_program_is_started(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the file's name is."""
    started, photo = tmp_path / "started", tmp_path / "holiday.jpg"
    photo.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for read in (read_photo, image_shape):
        with pytest.raises(UserError, match=r"holiday\.jpg cannot be read \(UnidentifiedImageError"):
            read(photo)
    assert not started.exists()
