"""The scores of one or more models, as a table."""

from collections.abc import Mapping, Sequence

from train.output.tables import format_table, number
from train.tasks import TASKS, Headline, Metrics, shown_headlines

DELTA = "delta_m"

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


def headlines() -> dict[str, Headline]:
    """The scores that can be shown, by their names in a run's record: TASK/KEY, and delta_m."""
    scores = {f"{name}/{headline.key}": headline for name, task in TASKS.items() for headline in task.headlines}
    return scores | {DELTA: Headline("Delta_m", True, "%")}


def title_of(name: str, signs: str = "^v") -> str:
    """Of a score by its name in a run's record: "seg mIoU % ^". ``signs`` stand for higher and lower is better."""
    key, higher, unit, _ = headlines()[name]
    words = [name.partition("/")[0] if name != DELTA else "", key, unit, signs[not higher]]
    return " ".join(filter(None, words))


def course_table(rows: Mapping[str, Mapping[str, float | None]], names: Sequence[str]) -> str:
    """One row per entry of ``rows``, which are scores by name, and one column per name."""
    units = [headlines()[name].unit for name in names]
    cells = [
        [title, *(number(scores.get(name), unit) for name, unit in zip(names, units, strict=True))]
        for title, scores in rows.items()
    ]
    return format_table([["scores", *map(title_of, names)], *cells])
