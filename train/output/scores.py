"""The scores of one or more models, as a table."""

from train.output.tables import format_table, number
from train.tasks import HEADLINES, Metrics


def score_table(columns: dict[str, Metrics]) -> str:
    """One row per metric that any column has, one column per entry of ``columns``.

    Cells are padded to the widths of all tasks and usual names, so that the tables of different runs line up.
    """
    rows = [["task   ", "metric", *(f"{name:>9}" for name in columns)]]
    for task, metric, higher, unit in HEADLINES:
        values = [column.get(task, {}).get(metric) for column in columns.values()]
        if any(value is not None for value in values):
            name = f"{f'{metric} {unit}':<12} {'^' if higher else 'v'} "
            rows.append([task, name, *(number(value, unit) for value in values)])
    return format_table(rows, text_columns=2) + "\n(^ higher is better, v lower)"
