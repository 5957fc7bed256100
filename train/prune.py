"""``python -m train.prune RUN --keep K --out DIR``: a run without the experts that its routers use least."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastmoe_lora import MoEConfig
from kernels import UserError
from model import MultiTaskModel
from train.cli import Parser, guarded
from train.config.settings import Settings
from train.datasets.base import DataSet
from train.datasets.batches import eval_loader, train_loader
from train.evaluation.validate import validate
from train.files.atomic import make_folder, write_json
from train.files.folders import claim, require_new
from train.output.scores import score_table
from train.run import checkpoint
from train.run.build import build_data, load_checkpoint, rebuild_model
from train.run.loop import train
from train.run.optimizers import build_optimizer
from train.run.weighting import build_weighting
from train.tasks import Metrics

CALIBRATION_BATCHES = 32  # of the training images, on which gates are measured

DESCRIPTION = f"""\
Drop the experts that the routers use least, K of N remain in every layer (the idea of SEER-MoE). An expert's use is its
gate mass, the mean over tasks, on {CALIBRATION_BATCHES} training batches. Shared experts stay. The scores before and
after are printed and written to DIR/prune.json. DIR becomes a run: evaluate, predict and train --resume read it.
--steps N fine-tunes it for so many steps, with a fresh optimiser."""


def build_parser() -> Parser:
    parser = Parser("train.prune", DESCRIPTION)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--keep", type=int, metavar="K", required=True, help="experts of a layer, shared ones included")
    parser.add_argument("--steps", type=int, metavar="N", default=0, help="fine-tune for N steps (0)")
    parser.add_argument("--out", metavar="DIR", required=True, help="what does not exist yet")
    return parser


def pruned_config(config: MoEConfig | None, keep: int, run: Path) -> MoEConfig:
    """The pool of K experts; UserError where K is none that is fewer and has enough sparse ones."""
    if config is None:
        raise UserError(f"{run} has no experts in its backbone: give a run with --moe N/k/S/r")
    least = config.active + config.shared
    if not least <= keep < config.experts:
        raise UserError(f"--keep {keep}: {config} can keep {least} to {config.experts - 1} experts")
    return replace(config, experts=keep)


def most_used(mass: Tensor, keep: int, shared: int) -> list[list[int]]:
    """Per layer the ``keep`` experts that stay, in their order: the sparse ones with the largest gate mass, a mean over
    the tasks of ``mass`` (layers, tasks, N), and the ``shared`` last."""
    experts = mass.shape[-1]
    use = mass.nanmean(1)[:, : experts - shared]
    chosen = use.argsort(dim=1, descending=True, stable=True)[:, : keep - shared].sort(dim=1).values
    return [[*row, *range(experts - shared, experts)] for row in chosen.tolist()]


def without_experts(tensors: dict[str, Tensor], kept: list[list[int]], rank: int) -> dict[str, Tensor]:
    """The tensors of a model, in its order, whose layers have only the ``kept`` experts: their rows of A and columns of
    B, and their routers' rows. Routers of ``naive-shared`` have none for shared experts."""
    cut = dict(tensors)
    layers = [name.removesuffix("routers") for name in tensors if name.endswith(".routers")]
    for layer, experts in zip(layers, kept, strict=True):
        routers = tensors[f"{layer}routers"]
        ranks = torch.tensor([expert * rank + i for expert in experts for i in range(rank)])
        cut[f"{layer}lora_A"] = tensors[f"{layer}lora_A"][ranks].contiguous()
        cut[f"{layer}lora_B"] = tensors[f"{layer}lora_B"][:, ranks].contiguous()
        cut[f"{layer}routers"] = routers[:, [e for e in experts if e < routers.shape[1]]].contiguous()
    return cut


def measured_mass(settings: Settings, model: MultiTaskModel, train_set: DataSet) -> Tensor:
    """Gate mass (layers, tasks, N) on training batches."""
    steps = range(CALIBRATION_BATCHES)
    batches = train_loader(train_set, model.tasks, settings.batch_size, steps, settings.seed, settings.workers)
    _, statistics = validate(model, batches, train_set.classes, "gates")
    assert statistics is not None
    return statistics.compute()[0]


def run(options: Namespace) -> None:
    given, out = Path(options.run), Path(options.out)
    require_new(out, "--out")
    folder = checkpoint.find(given)
    settings, model, state = load_checkpoint(folder)
    config = pruned_config(settings.moe_config, options.keep, given)
    if options.steps < 0:
        raise UserError(f"--steps {options.steps}: it must not be negative")
    total = state.step + options.steps
    fewer = replace(settings, moe=str(config), out="", steps=total)  # UserError for an impossible number of steps
    train_set, val_set = build_data(settings)
    kept = most_used(measured_mass(settings, model, train_set), options.keep, config.shared)
    smaller = rebuild_model(fewer, fewer.source.classes, without_experts(model.cpu().state_dict(), kept, config.rank))
    scores = {name: score(settings, which, val_set) for name, which in {"before": model, "pruned": smaller}.items()}
    make_folder(out)
    state = replace(state, settings=state.settings | {"moe": str(config), "out": ""}, written=[])
    weighting, scaler = build_weighting(fewer), torch.amp.GradScaler(enabled=False)
    parts = {"optimizer": build_optimizer(fewer, smaller, weighting), "scaler": scaler, "weighting": weighting}
    checkpoint.save(out, state, smaller, parts)
    if options.steps:
        tuned = train({"steps": total}, str(out), ["--resume", str(out), "--steps", str(total)])
        scores["fine-tuned"] = tuned["metrics"]
    pools = {"before": settings.moe, "after": str(config)}
    claim(out, "train.prune", ["prune.json"])
    write_json(out / "prune.json", {"run": str(given), "moe": pools, "kept": kept, "scores": scores})
    print(f"\n{settings.moe} -> {config}\n\n{score_table(scores)}\n\n{out}/: last, prune.json")


def score(settings: Settings, model: MultiTaskModel, val_set: DataSet) -> Metrics:
    """Metrics over the validation images."""
    loader = eval_loader(val_set, model.tasks, settings.batch_size, settings.workers)
    return validate(model, loader, val_set.classes, "evaluate")[0]


def main(argv: list[str] | None = None) -> int:
    """Prune; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
