"""Edge labels from a map of labels, as PASCAL-Context has them."""

import numpy as np
from scipy.ndimage import laplace

from train.metrics.thinning import thin


def edges_from_label_map(label_map: np.ndarray) -> np.ndarray:
    """Thinned non-zeros of the Laplacian of an integer (H, W) label map -> uint8 (H, W), 1 on an edge.

    It is the field's rule to the letter, a Laplacian and not an inequality of labels: a ramp n, n+1, n+2 one
    pixel wide cancels. Labels stay below 2**50, so that float64 sums them exactly. ``mode="mirror"`` is
    OpenCV's default border (reflect-101).
    """
    return thin(laplace(label_map.astype(np.float64), mode="mirror") != 0).astype(np.uint8)
