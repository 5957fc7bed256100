"""One training run from settings to results.json: read from top to bottom."""

import math
import operator
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastmoe_lora import RoutingStatistics
from kernels import UserError, nvtx, resolve_kernel
from kernels.nvtx import span, spanned
from model import MultiTaskViT
from train.config.settings import Settings, resolve_settings
from train.datasets.base import DataSet
from train.datasets.batches import Batch, collate, eval_loader, train_loader
from train.evaluation.results import describe_set
from train.evaluation.validate import score_constant, validate
from train.files.atomic import make_folder, write_json, write_text
from train.output.scores import score_table
from train.output.versions import versions
from train.run import build, checkpoint, schedule
from train.tasks import TASKS, Metrics

PICTURES = 8  # rows of predictions.png
CONSTANT_IMAGES = 1500  # training images the constant is fitted on
LOSS_WINDOW = 50  # steps over which final_losses are averaged
REPORT_EVERY = 10  # steps between two readings of the losses, each of which waits for the device


@dataclass
class Run:
    """What a run holds; ``baselines`` are the metrics of the untrained model and of the best constant."""

    settings: Settings
    out: Path
    device: torch.device
    data: tuple[DataSet, DataSet]
    model: MultiTaskViT
    optimizer: torch.optim.Optimizer
    step: int = 0
    baselines: dict[str, Metrics] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return schedule.total_steps(self.settings, len(self.data[0]))


def train(flags: dict[str, Any], resume: str | None) -> dict[str, Any]:
    """Train as ``flags`` say, leave results.json, last, predictions.png and routing.png, return the results."""
    folder = find_checkpoint(flags, resume)
    state = checkpoint.read_state(folder) if folder else None
    if folder:
        flags = {"out": str(folder.parent), **flags}
    run = set_up(resolve_settings(flags, state and state["settings"]), fresh=folder is None)
    if folder and state:
        checkpoint.restore(folder, run.model, run.optimizer)
        run.step, run.baselines = state["step"], state["baselines"]
        if run.step >= run.total:
            raise UserError(f"{folder} is at step {run.step} of {run.total} already: raise --steps or --epochs")
    else:
        run.baselines["untrained"], _ = score(run, "untrained")
        run.baselines["constant"] = constant_baseline(run)
    speed, losses = fit(run)
    return finish(run, speed, losses)


def find_checkpoint(flags: dict[str, Any], resume: str | None) -> Path | None:
    if resume is None:
        return None
    if not resume and "out" not in flags:
        raise UserError("--resume alone does not say which run: give --out DIR, or --resume DIR/last")
    return Path(resume or Path(flags["out"]) / "last").resolve()


def run_folder(settings: Settings, fresh: bool) -> Path:
    """Where the run lives: --out, which must not hold another run, or the next free runs/NAME."""
    if settings.out:
        out = Path(settings.out)
        if fresh and any((out / name).exists() for name in ("last", "results.json")):
            raise UserError(f"{out} already holds a run: continue it with --resume or choose another --out")
        return out
    name = Path(settings.recipe or "pascal_mt").stem
    candidates = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, sys.maxsize))
    return next(folder for folder in candidates if not folder.exists())


def set_up(settings: Settings, fresh: bool) -> Run:
    """Build everything, make the run's folder and say what will happen."""
    if settings.nvtx:
        nvtx.enable()
    device = build.build_device(settings)
    data = build.build_data(settings)
    model = build.build_model(settings, data[0].classes).to(device)
    out = run_folder(settings, fresh)
    make_folder(out)
    if skipped := [fault for dataset in data for fault in dataset.skipped]:
        write_text(out / "skipped.txt", "\n".join(skipped) + "\n")
    run = Run(settings, out, device, data, model, build.build_optimizer(settings, model))
    print(announce(run), flush=True)
    return run


def announce(run: Run) -> str:
    s, train_set = run.settings, run.data[0]
    total, trainable = count_parameters(run.model)
    adaptation = "backbone frozen" if s.pretrained else "no --pretrained, so the backbone is trained in full"
    moe = s.moe_config
    default = " (default)" if moe and not s.gating else ""
    return "\n".join(
        [
            f"data      {train_set.name}: {count_images(run)} at {s.image_size} px, "
            f"protocol {train_set.protocol.reported}",
            f"model     {s.model}, {s.head} heads for {', '.join(s.task_names)}: {total / 1e6:.2f} M parameters, "
            f"{trainable / 1e6:.2f} M trainable; {adaptation}",
            f"moe       {moe}, gating {moe.gating_name}{default}, site {s.site}, "
            f"kernel {resolve_kernel(s.kernel, run.device)}"
            if moe
            else "moe       none",
            f"run       {run.total} steps of {s.batch_size} images on {run.device} -> {run.out}",
        ]
    )


def count_images(run: Run) -> str:
    """How many images of each split are used and, where some are not, how many are skipped."""
    train_set, val_set = run.data
    text = f"{len(train_set)} train, {len(val_set)} val images"
    skipped = len(train_set.skipped), len(val_set.skipped)
    return f"{text} ({skipped[0]} and {skipped[1]} skipped, see skipped.txt)" if any(skipped) else text


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(total, trainable)."""
    return (sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad))


def training_step(run: Run, batch: Batch) -> Tensor:
    """One optimiser step; returns the unweighted losses, one per task in the model's order, still on the device."""
    s = run.settings
    for group in run.optimizer.param_groups:
        group["lr"] = schedule.learning_rate(s, run.step, run.total)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=s.precision == "bf16"):
        predictions = run.model(batch.images, batch.index)
    with span("losses"):
        losses = {task: TASKS[task].loss(prediction, batch.labels[task]) for task, prediction in predictions.items()}
        objective = reduce(operator.add, (s.task_weights[task] * loss for task, loss in losses.items()))
        if run.model.routing is not None:
            objective = objective + s.mi_weight * run.model.routing.mi_loss()
    run.optimizer.zero_grad()
    with span("backward"):
        objective.backward()
    with span("optimiser"):
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), s.clip_norm)
        run.optimizer.step()
    return torch.stack([losses[task] for task in run.model.tasks]).detach()


def fit(run: Run) -> tuple[float, dict[str, float]]:
    """Train from run.step to the end; (images per second, each task's loss averaged over the last steps).

    The speed leaves out the first step, which starts the workers, and the evaluations.
    """
    from torch.utils.tensorboard import SummaryWriter

    s, (train_set, _) = run.settings, run.data
    every = s.eval_every * schedule.steps_per_epoch(s, len(train_set))
    recent: deque[Tensor] = deque(maxlen=LOSS_WINDOW)
    seconds, first = 0.0, run.step
    loader = train_loader(train_set, s.task_names, s.batch_size, range(run.step, run.total), s.seed, s.workers)
    with SummaryWriter(run.out / "tensorboard") as board, progress_bar(run) as bar:
        started = time.perf_counter()
        for batch in spanned("data", loader):
            recent.append(training_step(run, batch.to(run.device)))
            run.step += 1
            seconds += time.perf_counter() - started if run.step > first + 1 else 0
            speed = s.batch_size * (run.step - first - 1) / seconds if seconds else 0.0
            bar.update()
            if run.step % REPORT_EVERY == 0 or run.step == run.total:
                report_losses(run, recent, speed, board, bar)
            if every and run.step % every == 0 and run.step < run.total:
                save(run)
                log_metrics(run, board, score(run, f"step {run.step}")[0])
            started = time.perf_counter()
    return speed, mean_losses(run, recent)


def progress_bar(run: Run) -> tqdm:
    """Drawn on terminals only; elsewhere :func:`report_losses` prints lines."""
    return tqdm(total=run.total, initial=run.step, desc="train", unit="step", dynamic_ncols=True, disable=None)


def mean_losses(run: Run, recent: Iterable[Tensor]) -> dict[str, float]:
    return dict(zip(run.model.tasks, torch.stack(list(recent)).mean(0).tolist(), strict=True))


def report_losses(run: Run, recent: deque[Tensor], speed: float, board: Any, bar: tqdm) -> None:
    """Show and log the losses of the last steps; a loss that is not finite ends the run."""
    losses = mean_losses(run, list(recent)[-REPORT_EVERY:])
    if not all(math.isfinite(loss) for loss in losses.values()):
        raise UserError(f"a loss is not finite at step {run.step}: {losses}; lower --lr and start again")
    text = "  ".join(f"{task} {loss:.3f}" for task, loss in losses.items()) + f"  {speed:.0f} images/s"
    bar.set_postfix_str(text, refresh=False)
    if bar.disable and (run.step % max(run.total // 10, REPORT_EVERY) == 0 or run.step == run.total):
        print(f"step {run.step:>6}/{run.total}  {text}", flush=True)
    for task, loss in losses.items():
        board.add_scalar(f"loss/{task}", loss, run.step)
    board.add_scalar("images_per_second", speed, run.step)
    board.add_scalar("lr", run.optimizer.param_groups[0]["lr"], run.step)


def log_metrics(run: Run, board: Any, metrics: Metrics) -> None:
    for task, values in metrics.items():
        for name, value in values.items():
            if value is not None:
                board.add_scalar(f"{task}/{name}", value, run.step)


def score(run: Run, title: str) -> tuple[Metrics, RoutingStatistics | None]:
    """The model's metrics over the validation set, and its routing."""
    s, val_set = run.settings, run.data[1]
    loader = eval_loader(val_set, s.task_names, s.batch_size, s.workers)
    return validate(run.model, loader, val_set.classes, title)


def constant_baseline(run: Run) -> Metrics:
    """The best constant's metrics, fitted on the training images of as many steps as make one epoch, at most
    CONSTANT_IMAGES of them."""
    s, (train_set, val_set) = run.settings, run.data
    steps = math.ceil(min(len(train_set), CONSTANT_IMAGES) / s.batch_size)
    fitted = train_loader(train_set, s.task_names, s.batch_size, range(steps), s.seed, s.workers)
    scored = eval_loader(val_set, s.task_names, s.batch_size, s.workers)
    return score_constant(fitted, scored, s.task_names, val_set.classes)


def save(run: Run) -> None:
    state = {"settings": asdict(run.settings) | {"out": ""}, "baselines": run.baselines}
    checkpoint.save(run.out, run.step, run.model, run.optimizer, state)


def finish(run: Run, speed: float, losses: dict[str, float]) -> dict[str, Any]:
    """Checkpoint, score, draw, write results.json and print the table."""
    save(run)
    metrics, routing = score(run, "evaluate")
    draw(run, routing)
    results = results_of(run, speed, losses, metrics)
    write_json(run.out / "results.json", results)
    columns = {"untrained": run.baselines["untrained"], "constant": run.baselines["constant"], "trained": metrics}
    print(f"\n{score_table(columns)}\n{count_images(run)}\n")
    print(f"{run.out}/: results.json, last, predictions.png, routing.png, tensorboard")
    return results


def results_of(run: Run, speed: float, losses: dict[str, float], metrics: Metrics) -> dict[str, Any]:
    s, (train_set, val_set) = run.settings, run.data
    total, trainable = count_parameters(run.model)
    moe = s.moe_config
    return {
        "format": 1,
        "command": shlex.join(["python", "-m", "train", *sys.argv[1:]]),
        "protocol": train_set.protocol.reported,
        "dataset": {
            "name": train_set.name,
            "train": len(train_set),
            "val": len(val_set),
            "image_size": s.image_size,
            "skipped": {"train": len(train_set.skipped), "val": len(val_set.skipped)},
        },
        "evaluation": describe_set(val_set, s.task_names, "val", f"{s.image_size} x {s.image_size}"),
        "model": {"name": s.model, "head": s.head, "site": s.site, "backbone": "frozen" if s.pretrained else "trained"},
        "moe": s.moe,
        "gating": moe.gating_name if moe else None,
        "kernel": resolve_kernel(s.kernel, run.device) if moe else None,
        "seed": s.seed,
        "steps": run.step,
        "images_per_second": round(speed, 2),
        "parameters": {"total": total, "trainable": trainable},
        "final_losses": losses,
        "metrics": metrics,
        "metrics_constant": run.baselines["constant"],
        "metrics_untrained": run.baselines["untrained"],
        "versions": versions(),
    }


@torch.inference_mode()
def draw(run: Run, routing: RoutingStatistics | None) -> None:
    """predictions.png for a few validation images of every group, and routing.png."""
    from train.output import pictures

    s, val_set = run.settings, run.data[1]
    indices = pictures.spread(val_set.groups, PICTURES)
    batch = collate([val_set[index, 0] for index in indices], s.task_names).to(run.device)
    run.model.eval()
    predictions = {"predicted": run.model(batch.images)}
    pictures.save_predictions(run.out / "predictions.png", batch, predictions, val_set.classes)
    if routing is not None and s.moe_config is not None:
        pictures.save_routing(run.out / "routing.png", routing, run.model.tasks, s.moe_config.shared)
