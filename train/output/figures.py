"""What all pictures of train/output share: pyplot without a screen, and how a figure becomes a file."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from train.files.atomic import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen before pyplot is imported)

__all__ = ["plt", "write_figure"]


def write_figure(figure: Figure, path: Path, dpi: int) -> None:
    """As a PNG, whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
    plt.close(figure)
