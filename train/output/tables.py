"""Tables of text and of Markdown. Needs the standard library alone, so that bench/ can use it on any machine."""

from collections.abc import Sequence


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
