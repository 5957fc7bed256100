"""The rows of a benchmark's results, read from the JSON file of pytest-benchmark."""

import json
from pathlib import Path

Row = dict
BOUND = "lorafusion"  # computes less than the layer: shown, but never the best peer


def read(path: Path) -> tuple[dict, list[Row], dict[str, str]]:
    """(machine and versions, the rows of all suites, why peers were not timed); ValueError for any other file."""
    try:
        data = json.loads(path.read_text())
        rows = [{**entry["extra_info"], "name": entry["name"]} for entry in data["benchmarks"]]
        facts = {
            "date": data["datetime"][:10],
            "commit": data["commit_info"].get("id", "unknown")[:10],
            "cpu": data["machine_info"]["cpu"].get("brand_raw", "unknown"),
            **data["machine_info"]["summary"],
        }
        absent = data["machine_info"].get("absent", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of pytest-benchmark ({error}): bench/README.md tells how") from None
    return facts, [row for row in rows if row.get("suite") in ("layer", "product", "train")], absent


def layer_rows(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["suite"] == "layer"]


def is_ours(row: Row) -> bool:
    """With the table's algorithm, or with one that is named."""
    return row["subject"].partition("-")[0] == "ours"


def best_peer(rows: list[Row], row: Row) -> Row | None:
    """The fastest peer of the same problem."""
    same = ("width", "tokens", "config", "direction")
    peers = [
        other
        for other in rows
        if other["suite"] == "layer"
        and not is_ours(other)
        and other["subject"] != BOUND
        and all(other[name] == row[name] for name in same)
    ]
    return min(peers, key=lambda peer: peer["added_seconds"], default=None)
