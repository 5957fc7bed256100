"""Images are read whole and in the mode that is asked for, or refused in one line."""

import numpy as np
import pytest
from PIL import Image

from kernels.errors import UserError
from train.files.images import image_shape, read_image


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
