"""Tables of text and of Markdown. Needs the standard library alone, so that bench/ can use it on any machine."""

from collections.abc import Sequence
from typing import Any


def format_table(rows: Sequence[Sequence[str]], markdown: bool = False, text_columns: int = 1) -> str:
    """``rows`` of equal length, the first of them the head, in columns as wide as their longest cell.

    The first ``text_columns`` columns hold text and stand left, the others numbers, which stand right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [cell.ljust(width) if i < text_columns else cell.rjust(width) for i, (cell, width) in enumerate(columns)]
        for columns in (zip(row, widths, strict=True) for row in rows)
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def number(value: float | None, unit: str) -> str:
    """Two decimals of a score with a unit, four of a loss."""
    return "n/a" if value is None else f"{value:.{2 if unit else 4}f}"


# Names that commands still import from here: they go once the commands take them from where they are.
align = format_table


def __getattr__(name: str) -> Any:
    if name in ("write_json", "make_folder"):
        from train.files import atomic

        return getattr(atomic, name)
    if name == "versions":
        from train.output.versions import versions

        return versions
    if name == "table":
        from train.output.scores import score_table

        return score_table
    raise AttributeError(name)
