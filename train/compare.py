"""``python -m train.compare RUN RUN ...``: the scores of runs in one table, and their predictions side by side."""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kernels import UserError
from train.cli import Parser, add_cache, guarded, new_folder
from train.config.settings import Settings
from train.datasets.base import open_dataset
from train.datasets.batches import collate
from train.datasets.files import Access
from train.evaluation.baselines import describe_baseline, with_baseline
from train.evaluation.results import Results, read_results, require_comparable
from train.files.atomic import write_text
from train.files.folders import claim
from train.output.tables import format_table, number
from train.run import checkpoint
from train.run.build import load_checkpoint
from train.run.record import NAME, read_record
from train.run.scores import CURVES, draw_curves
from train.tasks import shown_headlines

PICTURES = 8  # rows of the picture

Models = Mapping[str, tuple[Settings, torch.nn.Module]]

DESCRIPTION = """\
Print the scores of runs in one table and draw their predictions side by side. A RUN is an output folder of
python -m train or python -m train.evaluate. Runs of different protocols or image sets are refused.
OUT receives table.txt, table.md, curves.png (losses and scores in the course of the runs) and predictions.png."""


def build_parser() -> Parser:
    parser = Parser("train.compare", DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--baseline", metavar="FILE|NAME", help="Delta_m against a published row, a JSON file or a run")
    add_cache(parser)
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--out", metavar="DIR", help=new_folder("runs/compare"))
    return parser


def short_names(given: Sequence[str]) -> list[str]:
    """The last part of each path, preceded by as many parent folders as make the names distinct."""
    parts = [Path(path).resolve().parts for path in given]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"a run is given twice: {', '.join(given)}")


def rows_of(runs: Mapping[str, Results]) -> list[list[str]]:
    """The headings, then one row per run. Each score that any run has gets a column; Delta_m comes last."""
    shown = shown_headlines([results["metrics"] for results in runs.values()])
    heads = [f"{task} {h.key} {'^' if h.higher_is_better else 'v'}" for task, h in shown]
    rows = [["run", *heads]]
    for name, results in runs.items():
        name += f" (tta {results['tta']})" if "tta" in results else ""
        rows.append([name, *(number(_score(results, task, h.key), h.unit) for task, h in shown)])
    if any("delta_m" in results for results in runs.values()):
        for row, cell in zip(rows, ["Delta_m % ^", *(_delta(results) for results in runs.values())], strict=True):
            row.append(cell)
    return rows


def _score(results: Results, task: str, key: str) -> float | None:
    return results["metrics"].get(task, {}).get(key)


def _delta(results: Results) -> str:
    return "n/a" if results["delta_m"] is None else f"{results['delta_m']:+.2f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown, with arrows that show which direction is better."""
    signs = {"^": "↑", "v": "↓"}
    heads = [" ".join(signs.get(word, word) for word in head.split(" ")) for head in rows[0]]
    return format_table([heads, *rows[1:]], markdown=True)


def encodable(text: str) -> str:
    """Markdown with entities for what stdout cannot encode, such as the arrows on an ASCII terminal."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "xmlcharrefreplace").decode(encoding)


def caption(runs: Mapping[str, Results]) -> str:
    """One line: protocol, image set and, where there are any, odsF and the baseline."""
    first = next(iter(runs.values()))
    over = first["evaluation"]
    images = f"{over['images']} images of {over['split']}"
    lines = [f"protocol {first['protocol']}, labels at {over['compared_at']}, {images}"]
    if odsf := next((results["odsF"] for results in runs.values() if results.get("odsF")), None):
        lines.append(f"odsF over {odsf['images']} images, variant {odsf['variant']}")
    if baseline := first.get("baseline"):
        lines.append(f"Delta_m {describe_baseline(baseline)}")
    return "; ".join(lines)


def load_model(given: str, results: Results) -> tuple[Settings, torch.nn.Module] | None:
    """(settings, model) of the checkpoint that a run was scored with; None where there is none of that step."""
    path = Path(given)
    folder = checkpoint.find(Path(results.get("checkpoint") or (path if path.is_dir() else path.parent)))
    if "predictions" in results or not (folder / "state.json").is_file():
        return None
    settings, model, state = load_checkpoint(folder)
    return (settings, model) if state.step == results.get("step", results.get("steps")) else None


@torch.inference_mode()
def draw(path: Path, runs: Mapping[str, Results], models: Models, cache: str) -> None:
    """Draws a few validation images, their labels and each model's predictions. Runs share protocol and images."""
    from train.output import pictures

    results, (settings, _) = next(iter(runs.values())), next(iter(models.values()))
    tasks = tuple(dict.fromkeys(task for s, _ in models.values() for task in s.task_names))
    given, over = results["dataset"], results["evaluation"]
    source = replace(
        settings.source,
        root=given.get("root", settings.data),
        tasks=tasks,
        size=given["image_size"],
        protocol_name=results["protocol"].partition("@")[0],
        access=Access(partial_labels=True, cache=cache, val_images=given.get("val_images", settings.val_images)),
        dataset=given["name"],
    )
    dataset = open_dataset(source, over["split"])
    indices = pictures.spread(dataset.groups, PICTURES)
    batch = collate([dataset[index, 0] for index in indices], tasks)
    predictions = {name: model.cpu()(batch.images) for name, (_, model) in models.items()}
    pictures.save_predictions(path, batch, predictions, dataset.classes)


def draw_courses(path: Path, given: Mapping[str, str], protocol: str) -> bool:
    """Draws losses and scores over the steps of those runs, by name, that have a record; whether there are any."""
    folders = {name: Path(run) if Path(run).is_dir() else Path(run).parent for name, run in given.items()}
    records = {name: read_record(folder) for name, folder in folders.items() if (folder / NAME).is_file()}
    if records:
        draw_curves(path, records, protocol)
    return bool(records)


def run(options: Namespace) -> None:
    given, baseline = options.runs, options.baseline
    runs = dict(zip(short_names(given), map(read_results, given), strict=True))
    require_comparable(runs)
    runs = {name: with_baseline(results, baseline) if baseline else results for name, results in runs.items()}
    written = ["table.txt", "table.md", CURVES, "predictions.png"]
    out = claim(options.out, "train.compare", written, "runs/compare")
    rows, below = rows_of(runs), caption(runs)
    tables = {"table.txt": f"{format_table(rows)}\n\n{below}\n", "table.md": f"{markdown(rows)}\n\n{below}\n"}
    for name, text in tables.items():
        write_text(out / name, text)
    print(encodable(tables["table.md"]) if options.markdown else tables["table.txt"])
    if not draw_courses(out / CURVES, dict(zip(runs, given, strict=True)), next(iter(runs.values()))["protocol"]):
        written.remove(CURVES)
    models = {name: load_model(path, runs[name]) for name, path in zip(runs, given, strict=True)}
    loaded = {name: model for name, model in models.items() if model is not None}
    if lacking := [name for name in models if name not in loaded]:
        print(f"{out}/: {', '.join(written[:-1])}; no picture, as there is no checkpoint of {', '.join(lacking)}")
        return
    draw(out / "predictions.png", runs, loaded, options.cache)
    print(f"{out}/: {', '.join(written)}")


def main(argv: list[str] | None = None) -> int:
    """Compare; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
