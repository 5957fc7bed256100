"""Cityscapes' protocol: its rectangle, and the one scale of image and depth."""

import numpy as np
import pytest

from train.protocols import build_protocol


class Draws:
    """A generator that does not flip and chooses a scale."""

    def __init__(self, scale):
        self.scale = scale

    def random(self):
        return 0.9

    def integers(self, high):
        return self.scale


def test_inputs_are_twice_as_wide_as_high():
    assert build_protocol("cityscapes").shape == (512, 1024)
    assert build_protocol("cityscapes", 128).shape == (128, 256)
    assert build_protocol("cityscapes", 128).reported == "cityscapes@128"


@pytest.mark.parametrize(("scale", "factor"), [(0, 1.0), (1, 1.2), (2, 1.5)])
def test_what_looks_larger_is_nearer(scale, factor):
    raw = {"image": np.zeros((32, 64, 3), np.uint8), "depth": np.full((32, 64), 30, np.float32)}
    sample = build_protocol("cityscapes", 16).apply(raw, True, Draws(scale))
    assert sample["depth"].shape == (16, 32) and np.allclose(sample["depth"], 30 / factor)


def test_its_notes_say_what_published_numbers_are_of():
    notes = " ".join(build_protocol("cityscapes").notes)
    assert "19 classes" in notes and "inverse depth" in notes and build_protocol("cityscapes").published == ""
