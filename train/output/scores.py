"""The scores of one or more models, as a table."""

from train.output.tables import format_table, number
from train.tasks import Metrics, shown_headlines

LEGEND = "^ higher is better, v lower; mIoU: over the classes that labels show"
FIELD_LEGEND = "; mIoU_field: over all classes, absent ones count 0"


def score_table(columns: dict[str, Metrics]) -> str:
    """One row per metric that any column has, one column per entry of ``columns``.

    Cells are padded to the widths of all tasks and usual names, so that the tables of different runs line up.
    """
    shown = shown_headlines(list(columns.values()))
    rows = [["task   ", "metric", *(f"{name:>9}" for name in columns)]]
    for task, (key, higher, unit, _) in shown:
        name = f"{f'{key} {unit}':<12} {'^' if higher else 'v'} "
        rows.append([task, name, *(number(column.get(task, {}).get(key), unit) for column in columns.values())])
    return f"{format_table(rows, text_columns=2)}\n({legend([headline.key for _, headline in shown])})"


def legend(keys: list[str]) -> str:
    """What the marks and names of a table with these scores mean."""
    return LEGEND + (FIELD_LEGEND if "mIoU_field" in keys else "")
