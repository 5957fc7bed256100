"""One table as text, Markdown, LaTeX and CSV. Headings end in "^" or "v", which says which direction is better; a cell
may hold a mean and a deviation, "1.0 +- 0.1"."""

import csv
import io
import re
from collections.abc import Callable, Sequence

from train.output.tables import format_table

Rows = Sequence[Sequence[str]]
PLUS_MINUS = " +- "
ARROWS = {"^": "\N{UPWARDS ARROW}", "v": "\N{DOWNWARDS ARROW}"}
TEX_ARROWS = {"^": r"$\uparrow$", "v": r"$\downarrow$"}
TEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {character: f"\\{character}" for character in "&%$#_{}"}
)
TEX_RULES = ("\\toprule", "\\midrule", "\\bottomrule")


def as_text(rows: Rows, caption: str) -> str:
    """Columns of ASCII."""
    return f"{format_table(rows)}\n\n{caption}\n"


def as_markdown(rows: Rows, caption: str) -> str:
    """With arrows and the sign of a deviation."""
    heads = [_with_arrow(head, ARROWS) for head in rows[0]]
    cells = [[cell.replace(PLUS_MINUS, " ± ") for cell in row] for row in rows[1:]]
    return f"{format_table([heads, *cells], markdown=True)}\n\n{caption}\n"


def as_latex(rows: Rows, caption: str) -> str:
    """A tabular with the rules of the package booktabs. Names are escaped; the caption is a comment."""
    heads = [_with_arrow(head, TEX_ARROWS, _escaped) for head in rows[0]]
    lines = [" & ".join(cells) + r" \\" for cells in [heads, *([_tex_cell(cell) for cell in row] for row in rows[1:])]]
    columns = "l" + "r" * (len(heads) - 1)
    top, middle, bottom = TEX_RULES
    body = [rf"\begin{{tabular}}{{{columns}}}", top, lines[0], middle, *lines[1:], bottom, r"\end{tabular}"]
    return "\n".join([f"% {' '.join(caption.split())}", r"% needs \usepackage{booktabs}", *body, ""])


def as_csv(rows: Rows, caption: str) -> str:
    """Numbers alone: a column with deviations is two, an empty cell is not available, and the caption is left out."""
    columns = []
    for head, *cells in zip(*rows, strict=True):
        name, values = re.sub(r" [v^]$", "", head), ["" if cell == "n/a" else cell for cell in cells]
        if any(PLUS_MINUS in cell for cell in values):
            means, _, deviations = zip(*(cell.partition(PLUS_MINUS) for cell in values), strict=True)
            columns += [[name, *means], [f"{name} deviation", *deviations]]
        else:
            columns.append([name, *values])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
    return text.getvalue()


FORMATS: dict[str, tuple[str, Callable[[Rows, str], str]]] = {  # the suffix of the file, and what it holds
    "text": ("txt", as_text),
    "markdown": ("md", as_markdown),
    "latex": ("tex", as_latex),
    "csv": ("csv", as_csv),
}


def _with_arrow(head: str, arrows: dict[str, str], convert: Callable[[str], str] = str) -> str:
    name, space, last = head.rpartition(" ")
    return f"{convert(name)}{space}{arrows[last]}" if last in arrows else convert(head)


def _escaped(text: str) -> str:
    return " ".join(text.split()).translate(TEX)


def _tex_cell(cell: str) -> str:
    """A number's minus is one of mathematics; other text is escaped."""
    return re.sub(r"^-(?=\d)", "$-$", _escaped(cell)).replace(PLUS_MINUS, r" $\pm$ ")
