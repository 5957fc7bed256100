"""What all pictures of train/output share: pyplot without a screen, and how a figure becomes a file."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from train.files.atomic import replacing
from train.files.printing import printable

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen before pyplot is imported)

plt.rcParams["pdf.fonttype"] = 42  # TrueType: publishers refuse matplotlib's default, Type 3

__all__ = ["plt", "write_figure"]


def write_figure(figure: Figure, path: Path, dpi: int) -> None:
    """As a PNG, or a PDF where ``path`` ends so, whole or not at all. Names of files in its texts may hold anything."""
    for text in figure.findobj(Text):
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix[1:].lower())
    plt.close(figure)
