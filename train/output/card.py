"""The model card of an exported run: README.md with the front matter of the Hugging Face Hub."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.config.settings import Settings
from train.output.scores import legend
from train.output.tables import format_table, number
from train.output.versions import versions
from train.tasks import TASKS, shown_headlines

TEMPLATE = """\
---
library_name: fastmoe_lora
tags: [multi-task-learning, dense-prediction, lora, mixture-of-experts]{base}
---
# {model} for {tasks}

One image in, {tasks} out: {model} at {width} x {height} pixels, patches of {patch}, {experts}. Backbone: {backbone}.

## Scores

Protocol `{protocol}`, {images} images of {dataset} {split}. Predictions are compared with labels at {compared_at}.
Scores of other protocols or image sets are not comparable.

{scores}

{legend}.{odsf}

## Use

```bash
python -m train.predict FOLDER PHOTOS --out pictures
```

FOLDER is this repository on disk. {note}Images are RGB in 0..255; the input normalisation is part of the weights.

{outputs}

## Training

Step {step} of

```bash
{commands}
```

Trained with {trained_with}. Exported with {exported_with}.
"""


def write_card(
    settings: Settings, results: Mapping[str, Any], step: int, patch: int, commands: Sequence[Mapping[str, Any]]
) -> str:
    """The text of the card. ``results`` are the content of a results.json, ``settings`` and ``commands``, which trained
    the model, those of :func:`train.export.public_state`."""
    over, shown = results["evaluation"], shown_headlines([results["metrics"]])
    named = f", those in {over['set']}" if over["set"] else ""
    height, width = settings.image_shape
    return TEMPLATE.format(
        base=f"\nbase_model: {settings.pretrained.partition('@')[0]}" if "/" in settings.pretrained else "",
        model=settings.model,
        tasks=", ".join(settings.task_names),
        width=width,
        height=height,
        patch=patch,
        experts=describe(settings),
        backbone=f"frozen weights `{settings.pretrained}`" if settings.pretrained else "trained in full",
        protocol=results["protocol"],
        images=over["images"],
        dataset=results["dataset"]["name"],
        split=f"{over['split']}{named}",
        compared_at=over["compared_at"],
        scores=score_rows(results),
        legend=legend([headline.key for _, headline in shown]),
        odsf=describe_odsf(results.get("odsF")),
        note=_needed(settings),
        outputs=output_rows(settings.task_names),
        step=step,
        commands="\n".join(entry["command"] for entry in commands),
        trained_with=_list(results["versions"]),
        exported_with=_list(versions()),
    )


def describe(settings: Settings) -> str:
    if settings.decoder != "none":
        return f"under the decoder `{settings.decoder}`"
    if moe := settings.moe_config:
        return f"{settings.head} heads, experts {moe} (gating {moe.gating_name}) at {settings.site}"
    return f"{settings.head} heads, without experts"


def describe_odsf(odsf: Mapping[str, Any] | None) -> str:
    if not odsf:
        return ""
    return f" odsF: {odsf['images']} images ({odsf['mode']}), variant {odsf['variant']}."


def score_rows(results: Mapping[str, Any]) -> str:
    """One row per score, with the images and the digest of their ids that it is over."""
    labelled = results["evaluation"]["labelled"]
    rows = [["task", "score", "images", "value"]]
    for task, (key, higher, unit, _) in shown_headlines([results["metrics"]]):
        over = f"{labelled[task]['images']} ({labelled[task]['ids']})" if task in labelled else ""
        value = number(results["metrics"][task].get(key), unit)
        rows.append([task, f"{key} {unit} {'^' if higher else 'v'}".replace("  ", " "), over, value])
    return format_table(rows, markdown=True, text_columns=3)


def output_rows(tasks: tuple[str, ...]) -> str:
    rows = [["file", "content"], *([f"`{TASKS[task].folder}/<name>.png`", TASKS[task].content] for task in tasks)]
    return format_table(rows, markdown=True, text_columns=2)


def without_paths(command: str) -> str:
    """``command`` with the last part of each absolute path: a card names no folders of the machine."""
    words = [word.rpartition("=") for word in shlex.split(command)]
    return shlex.join(f"{name}{equals}{_last(value)}" for name, equals, value in words)


def _last(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def _needed(settings: Settings) -> str:
    if settings.decoder == "none":
        return ""
    return f"It holds the decoder alone: the weights `{settings.pretrained}` of its encoder are needed too. "


def _list(named: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in named.items())
