"""Maps of experts: which expert a patch shows, in which colour, and where it lies on the photo."""

import cv2
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from train.output import expert_maps
from train.output.expert_maps import COLOURS, OTHERS, ExpertMaps, Place, colours_of, save_expert_maps

SQUARE = Place((64, 64), (64, 64), (slice(0, 64), slice(0, 64)))


def maps_of(shared):
    """(layers 0 and 5, two tasks, 2 x 3 patches, five experts)."""
    gates = torch.tensor([[0.1, 0.4, 0.0, 0.2, 0.3], [0.0, 0.3, 0.5, 0.1, 0.1]])
    return ExpertMaps((0, 5), ("seg", "edge"), gates[torch.arange(24) % 2].view(2, 2, 2, 3, 5), shared)


def test_the_largest_sparse_gate_and_the_sum_of_shared_ones():
    maps = maps_of(shared=2)
    assert maps.best[0, 0].tolist() == [[1, 2, 1], [2, 1, 2]]
    np.testing.assert_allclose(maps.mass[1, 1], [[0.5, 0.2, 0.5], [0.2, 0.5, 0.2]], rtol=1e-6)
    assert maps_of(shared=4).best.max() == 0 and maps_of(shared=0).mass.max() == 0


def test_any_two_colours_differ_by_more_than_lightness():
    """In the plane of CIELAB that lightness is orthogonal to; the grey of the rest is one of them."""
    lab = cv2.cvtColor(np.array([[to_rgb(colour) for colour in (*COLOURS, OTHERS)]], np.float32), cv2.COLOR_RGB2Lab)[0]
    apart = np.linalg.norm(lab[:, None, 1:] - lab[None, :, 1:], axis=-1)
    assert apart[~np.eye(len(lab), dtype=bool)].min() > 20


def test_the_experts_that_most_patches_use_have_colours():
    few = colours_of(np.array([7, 3, 7, 11]))
    assert [*few] == [3, 7, 11] and len({*few.values()}) == 3 and OTHERS not in few.values()
    many = colours_of(np.concatenate([np.arange(40), np.arange(20, 40, 2), [31, 33, 35, 37, 39]]))
    coloured = [expert for expert, colour in many.items() if colour != OTHERS]
    assert coloured == sorted([*range(20, 40, 2), 31, 33, 35, 37, 39]) and len(many) == 40


def test_padding_lies_outside_of_the_photo_and_a_stretch_is_undone():
    """A photo of 100 x 50, shrunk to 32 x 16 in the middle of 48 x 32 pixels; the same photo stretched to a square."""
    padded = Place((50, 100), (32, 48), (slice(8, 24), slice(8, 40)))
    assert padded.extent == pytest.approx((-25, 125, 75, -25))
    assert Place((50, 100), (64, 64), (slice(0, 64), slice(0, 64))).extent == pytest.approx((0, 100, 50, 0))


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_picture_has_a_map_per_task_and_layer_and_says_what_they_are(shared, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(expert_maps, "write_figure", lambda figure, path, dpi: figures.append(figure))
    save_expert_maps(tmp_path / "maps.png", np.zeros((64, 64, 3), np.uint8), SQUARE, maps_of(shared))
    (figure,) = figures
    drawn = [image for axis in figure.axes for image in axis.get_images()]
    assert len(drawn) == 1 + 4 * (2 if shared else 1)
    first = np.asarray(drawn[1].get_array())
    (legend,) = (block.legends[0] for block in figure.subfigs if block.legends)
    named = {
        text.get_text(): patch.get_facecolor()[:3]
        for text, patch in zip(legend.texts, legend.get_patches(), strict=True)
    }
    assert tuple(first[0, 0]) == pytest.approx(named["1"]) and tuple(first[0, 1]) == pytest.approx(named["2"])
    titles = [block.get_suptitle() for block in figure.subfigs]
    assert "sparse expert with the largest gate" in titles
    assert ("gate mass of the shared expert" in titles) == (shared == 1)
    assert ("gate mass of the 2 shared experts" in titles) == (shared == 2)
    if shared:
        masses = np.stack([np.asarray(image.get_array()) for image in drawn[5:]])
        assert drawn[-1].get_clim() == pytest.approx((0, masses.max()))
        np.testing.assert_allclose(masses[1], maps_of(shared).mass[0, 1])
