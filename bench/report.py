"""Tables and plots of benchmark results.

    python -m bench.report RESULTS.json ... [--markdown] [--plots DIR]

RESULTS.json is what `pytest bench/ --benchmark-only --benchmark-json=RESULTS.json` wrote. Rows of different machines or
runs are never in one table.
"""

import argparse
import sys
from pathlib import Path

from bench.rows import Row, best_peer, is_ours, layer_rows, read
from train.files.printing import printing
from train.output.tables import format_table


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}"


def spread(times: dict[str, float]) -> str:
    return f"{microseconds(times['median'])} ({microseconds(times['p20'])}..{microseconds(times['p80'])})"


HEAD = [
    "width, tokens",
    "experts, subject",
    "graph us",
    "/ frozen",
    "eager us (p20..p80)",
    "/ frozen",
    "GELU",
    "floor",
    "of floor",
    "added us",
    "/ best peer",
    "GB/s",
    "TFLOP/s",
    "peak MB",
    "saved MB",
    "error",
    "bitwise",
]


def layer_table(rows: list[Row], direction: str, markdown: bool) -> str:
    """One line for every row of a direction."""
    chosen = [row for row in layer_rows(rows) if row["direction"] == direction]
    lines = [layer_line(row, best_peer(rows, row)) for row in sorted(chosen, key=_order)]
    return format_table([HEAD, *lines], markdown, text_columns=2)


def _order(row: Row) -> tuple:
    order = row["subject"] != "ours", not is_ours(row), row["ratio"]
    return row["width"], row["tokens"], row["config"], *order


def layer_line(row: Row, peer: Row | None) -> list[str]:
    graph, peak = row.get("graph"), row.get("peak_bytes")
    versus = "" if peer is None or not is_ours(row) else f"{row['added_seconds'] / peer['added_seconds']:.2f}"
    return [
        f"{row['width']}, {row['tokens']:,}",
        f"{row['config']} {row['subject']}",
        microseconds(graph["seconds"]["subject"]["median"]) if graph else "",
        f"{graph['ratio']:.3f}" if graph else "",
        spread(row["seconds"]["subject"]),
        f"{row['ratio']:.3f}",
        f"{100 * row['gelu_share']:.0f} %" if "gelu_share" in row else "",
        f"{row['floor_ratio']:.3f}",
        f"{100 * row['of_floor']:.0f} %",
        microseconds(row["added_seconds"]),
        versus,
        f"{row['bytes_per_second'] / 1e9:,.0f}",
        f"{row['flops_per_second'] / 1e12:.2f}",
        f"{peak['subject'] / 2**20:,.0f}" if peak else "",
        f"{row['saved_bytes'] / 2**20:,.1f}",
        f"{max(row['error'].values()):.0e}",
        "yes" if row["bitwise"] else "no",
    ]


PRODUCT_HEAD = ["product", "tokens", "us (p20..p80)", "cuBLAS us", "of cuBLAS", "TFLOP/s"]


def product_table(rows: list[Row], markdown: bool) -> str:
    lines = [
        [
            row["subject"],
            f"{row['tokens']:,}",
            spread(row["seconds"]["subject"]),
            microseconds(row["seconds"]["cublas"]["median"]),
            f"{100 * row['of_cublas']:.0f} %",
            f"{row['flops_per_second'] / 1e12:.0f}",
        ]
        for row in rows
        if row["suite"] == "product"
    ]
    return format_table([PRODUCT_HEAD, *lines], markdown, text_columns=2) if lines else ""


TRAIN_HEAD = ["model", "subject", "images/s", "/ plain LoRA", "peak MB", "heads", "loader images/s", "40 epochs"]


def train_table(rows: list[Row], markdown: bool) -> str:
    chosen = [row for row in rows if row["suite"] == "train"]
    plain = {row["model"]: row["images_per_second"] for row in chosen if row["subject"] == "plain-lora"}
    lines = [
        [
            row["model"],
            row["subject"],
            f"{row['images_per_second']:,.1f}",
            f"{plain[row['model']] / row['images_per_second']:.3f}" if row["model"] in plain else "",
            f"{row['peak_bytes'] / 2**20:,.0f}" if row.get("peak_bytes") else "",
            f"{100 * row['heads_share']:.0f} %",
            f"{row['loader_images_per_second']:,.0f}",
            f"{row['paper_minutes']:,.1f} min",
        ]
        for row in chosen
    ]
    return format_table([TRAIN_HEAD, *lines], markdown, text_columns=2) if lines else ""


def text(path: Path, markdown: bool) -> str:
    facts, rows, absent = read(path)
    title = f"{path.name}: " + ", ".join(f"{name} {value}" for name, value in facts.items())
    parts = [f"## {title}" if markdown else title]
    for direction in dict.fromkeys(row["direction"] for row in layer_rows(rows)):
        parts.append(f"\n{'### ' if markdown else ''}FFN, {direction}\n\n{layer_table(rows, direction, markdown)}")
    if layer_rows(rows):
        parts += [f"absent  {peer}: {reason}" for peer, reason in absent.items()]
    sections = ("Our products beside cuBLAS", product_table), ("Training step, five tasks", train_table)
    for name, build in sections:
        if table := build(rows, markdown):
            parts.append(f"\n{'### ' if markdown else ''}{name}\n\n{table}")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw, one PNG per file and plot")
    chosen = parser.parse_args(arguments)
    try:
        with printing():
            for path in chosen.results:
                print(text(path, chosen.markdown), end="\n\n")
                if chosen.plots:
                    from bench.plots import draw

                    for picture in draw(path.stem, read(path)[1], chosen.plots):
                        print(picture)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
