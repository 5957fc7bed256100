"""Pictures of the layer suite: roofline, bars against peers, cost against N at fixed N r, cost against T."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.typing import ColorType  # noqa: E402

from bench.rows import Row, layer_rows  # noqa: E402

OURS, OTHERS = "#c2410c", matplotlib.color_sequences["tab10"]
DIRECTIONS = ("forward", "forward+backward")


def draw(stem: str, rows: list[Row], folder: Path) -> list[Path]:
    """Writes the plots that the rows have data for and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = layer_rows(rows)
    if not rows:
        return []
    made = []
    for name, plot in (("roofline", roofline), ("peers", peers), ("experts", experts), ("tokens", tokens)):
        figure = plot(rows)
        made.append(folder / f"{stem}-{name}.png")
        figure.savefig(made[-1], dpi=120, bbox_inches="tight")
        plt.close(figure)
    return made


def colour(subject: str, subjects: list[str]) -> ColorType:
    return OURS if subject == "ours" else OTHERS[subjects.index(subject) % len(OTHERS)]


def subjects_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["subject"] for row in rows))


def two_panels(title: str, rows: list[Row]) -> tuple[Figure, dict[str, Axes]]:
    """(figure, its axes by direction), of the directions that the rows have."""
    directions = [name for name in DIRECTIONS if any(row["direction"] == name for row in rows)]
    figure, axes = plt.subplots(
        1, len(directions), figsize=(5.5 * len(directions), 4.2), constrained_layout=True, squeeze=False
    )
    figure.suptitle(title)
    for axis, direction in zip(axes[0], directions, strict=True):
        axis.set_title(direction, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, dict(zip(directions, axes[0], strict=True))


def roofline(rows: list[Row]) -> Figure:
    """Operations per second over operations per byte, under the ceilings that were measured in the same run."""
    figure, panels = two_panels("Roofline of the adapted FFN", rows)
    subjects, tops = subjects_of(rows), rows[0]["ceilings"]
    for direction, axis in panels.items():
        points = [row for row in rows if row["direction"] == direction]
        at = [row["flops_per_second"] / row["bytes_per_second"] for row in points]
        ridge = tops["flops_per_second"] / tops["bytes_per_second"]
        reach = [min([*at, ridge]) / 3, ridge, max([*at, ridge]) * 3]
        axis.plot(
            reach,
            [min(tops["flops_per_second"], i * tops["bytes_per_second"]) / 1e12 for i in reach],
            color="black",
            linewidth=1,
        )
        for subject in subjects:
            mine = [(i, row) for i, row in zip(at, points, strict=True) if row["subject"] == subject]
            axis.scatter(
                [i for i, _ in mine],
                [row["flops_per_second"] / 1e12 for _, row in mine],
                s=18,
                color=colour(subject, subjects),
                label=subject,
                zorder=3 if subject == "ours" else 2,
            )
        axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    list(panels.values())[-1].legend(fontsize=7, frameon=False)
    return figure


def largest(rows: list[Row]) -> list[Row]:
    """The rows of the paper's width, or the widest there is, with the most tokens."""
    widths = {row["width"] for row in rows}
    width = 768 if 768 in widths else max(widths)
    most = max(row["tokens"] for row in rows if row["width"] == width)
    return [row for row in rows if row["width"] == width and row["tokens"] == most]


def peers(rows: list[Row]) -> Figure:
    """Time over the frozen FFN's, subject by subject, for the paper's pool; the line is the floor."""
    chosen = [row for row in largest(rows) if row["config"] == "16/3/1/4"] or largest(rows)
    figure, panels = two_panels(
        f"Adapted / frozen FFN, {chosen[0]['config']}, width {chosen[0]['width']}, {chosen[0]['tokens']:,} tokens",
        chosen,
    )
    for direction, axis in panels.items():
        mine = sorted((row for row in chosen if row["direction"] == direction), key=lambda row: -row["ratio"])
        subjects = subjects_of(rows)
        bars = axis.barh(
            [row["subject"] for row in mine],
            [row["ratio"] for row in mine],
            color=[colour(row["subject"], subjects) for row in mine],
        )
        axis.bar_label(bars, [f"{row['ratio']:.2f}" for row in mine], padding=3, fontsize=8)
        axis.axvline(1, color="black", linewidth=1)
        if mine:
            axis.axvline(mine[0]["floor_ratio"], color="black", linewidth=1, linestyle=":")
        axis.set_xlabel("time / frozen (solid: frozen, dotted: floor)")
        axis.margins(x=0.12)
    return figure


def experts(rows: list[Row]) -> Figure:
    """Added time over N where N r stays the same: granularity should cost nothing."""
    chosen = [row for row in largest(rows) if row["config"].split("/")[2] != "0"]
    return curves(
        chosen, "Time added by the experts at N r = 64", "experts N", lambda row: int(row["config"].split("/")[0])
    )


def tokens(rows: list[Row]) -> Figure:
    """Added time over T for the paper's pool."""
    width = largest(rows)[0]["width"]
    chosen = [row for row in rows if row["width"] == width and row["config"] == "16/3/1/4"]
    return curves(chosen, f"Time added by the experts, 16/3/1/4, width {width}", "tokens T", lambda row: row["tokens"])


def curves(rows: list[Row], title: str, label: str, place: Callable[[Row], int]) -> Figure:
    figure, panels = two_panels(title, rows)
    subjects = subjects_of(rows)
    for direction, axis in panels.items():
        for subject in subjects:
            mine = sorted(
                (place(row), 1e6 * max(row["added_seconds"], 1e-7))
                for row in rows
                if (row["direction"], row["subject"]) == (direction, subject)
            )
            axis.plot(
                *zip(*mine, strict=True),
                marker="o",
                markersize=4,
                color=colour(subject, subjects),
                label=subject,
                linewidth=2.2 if subject == "ours" else 1,
            )
        ticks = sorted({place(row) for row in rows})
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="added us")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    list(panels.values())[-1].legend(fontsize=7, frameon=False)
    return figure
