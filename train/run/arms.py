"""The runs of a study: each arm is trained once per seed, unless it was already."""

from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kernels import UserError
from train.config.arms import DECODERS, FIGURES, LIKE, MOMENTS, ROUTED, Arm
from train.config.settings import resolve_settings
from train.evaluation.results import Results, finished_results
from train.files.atomic import writing
from train.files.progress import quiet
from train.files.reading import require_schema
from train.run import checkpoint
from train.run.backbone import settings_of
from train.run.build import build_model
from train.run.loop import train
from train.run.start import count_parameters
from train.run.weighting import WEIGHTINGS

TOLERANCE = 0.05  # share of LIKE's trainable parameters by which a decoder's may differ
STEPS = (8, 1)  # of a decoder's width: a multiple of 8 where that is close enough
# A run's numbers do not depend on these.
WITHOUT_MEANING = (
    "out",
    "workers",
    "device",
    "kernel",
    "tracker",
    "wandb_project",
    "cache",
    "recipe",
    "baselines",
    "dataset",
)
# These have a flag; other settings are given by --set.
NAMED = ("tasks", "recipe", "data", "pretrained", "steps", "epochs", "seed", "workers", "tracker", "out")

WEIGHTED = "weighting"  # the study of LIKE by every weighting, which is no figure of ASE


def arms_of(study: str) -> tuple[Arm, ...]:
    """What a figure, a table or the study WEIGHTED compares."""
    if study == WEIGHTED:
        return tuple(Arm(LIKE.recipe, weighting=name) for name in WEIGHTINGS)
    return tuple(map(Arm, FIGURES[study]))


@dataclass(frozen=True)
class Runs:
    """The runs in ``out``, of which ``shared`` are the common settings."""

    out: Path
    shared: dict[str, Any]

    def folder(self, arm: Arm, seed: int) -> Path:
        return self.out / f"{arm.name}-{seed}"

    def flags(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The settings of ``python -m train`` for a run."""
        own = dict(arm.values)
        if arm in DECODERS:
            own["decoder_width"] = self.widths[arm]
        if arm == ROUTED and (steps := resolve_settings(self.shared).steps):
            own["routing_every"] = max(1, steps // MOMENTS)
        return self.shared | own | {"seed": seed, "out": str(self.folder(arm, seed))}

    def finished(self, arm: Arm, seed: int) -> Results | None:
        """The results of a finished run, else None. UserError where it was trained with other settings."""
        folder = self.folder(arm, seed)
        if not (folder / "results.json").exists():
            return None
        newest = checkpoint.find(folder)
        before, now = map(asdict, (settings_of(newest), resolve_settings(self.flags(arm, seed))))
        changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
        if changed := [text for text in changed if text.split()[0] not in WITHOUT_MEANING]:
            raise UserError(f"{folder} was trained with other settings ({', '.join(changed)}): choose another --out")
        results = finished_results(folder, checkpoint.read_state(newest).step)
        if results:
            require_schema(folder / "results.json", results, {"model": {"name": str}, "steps": int})
        return results

    def run(self, arm: Arm, seed: int) -> Results:
        """The results of a run, which is trained, or continued, if it is not finished. What it prints goes to a file
        beside its folder."""
        if (results := self.finished(arm, seed)) is not None:
            return results
        flags = self.flags(arm, seed)
        path = self.out / f"{arm.name}-{seed}.log"
        with writing(path):
            log = path.open("w", encoding="utf-8")
        with log, redirect_stdout(log):
            return train(flags, "", argv_of(flags))

    @cached_property
    def widths(self) -> dict[Arm, int]:
        """Per decoder the width at which its trainable parameters come closest to those of LIKE."""
        wanted = self._trainable(LIKE.values)
        return {arm: self._equal_width(arm, wanted) for arm in DECODERS}

    def _equal_width(self, arm: Arm, wanted: int) -> int:
        """UserError where no width is within TOLERANCE."""
        for step in STEPS:
            apart, width = self._closest_width(arm, wanted, step)
            if apart <= TOLERANCE:
                return width
        raise UserError(
            f"the decoder {arm.name} has no width with the {wanted:,} trainable parameters of {LIKE.name}: the "
            f"closest, {width}, is {100 * apart:.0f} % away"
        )

    def _closest_width(self, arm: Arm, wanted: int, step: int) -> tuple[float, int]:
        """(the share of ``wanted`` that is missing or too much, width)."""
        low, high = 8, 16
        while self._at_width(arm, high) < wanted:
            low, high = high, 2 * high
        while high - low > step:  # parameters grow with the width
            middle = (low + high) // 2 // step * step
            low, high = (middle, high) if self._at_width(arm, middle) < wanted else (low, middle)
        return min((abs(self._at_width(arm, width) / wanted - 1), width) for width in (low, high))

    def _at_width(self, arm: Arm, width: int) -> int:
        """The encoder is frozen, so that its weights do not matter."""
        return self._trainable(arm.values | {"decoder_width": width, "pretrained": ""})

    def _trainable(self, values: dict[str, Any]) -> int:
        settings = resolve_settings(self.shared | values)
        with quiet():
            return count_parameters(build_model(settings, settings.source.classes, counted=True))[1]


def argv_of(flags: dict[str, Any]) -> list[str]:
    """The command line of ``flags``."""
    named = [text for name in NAMED if name in flags for text in (f"--{name}", str(flags[name]))]
    return named + [text for name in flags if name not in NAMED for text in ("--set", f"{name}={flags[name]}")]
