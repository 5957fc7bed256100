"""One training run from settings to results.json: read from top to bottom."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from fastmoe_lora import RoutingStatistics
from fastmoe_lora.ranks import world_size
from kernels import UserError
from train.config.settings import Settings, resolve_settings
from train.datasets.batches import batch_ids, collate, eval_loader, train_loader
from train.evaluation.results import describe_set
from train.evaluation.validate import validate
from train.files.atomic import write_json
from train.files.progress import counter
from train.output.scores import score_table
from train.output.versions import versions
from train.run import checkpoint, routes, schedule
from train.run.build import kernel_of
from train.run.constant import constant_scores
from train.run.distributed import agreed, from_leader, leads, processes
from train.run.graphs import GraphedStep
from train.run.optimizers import averaged
from train.run.pace import Pace
from train.run.record import NAME, NotFiniteError
from train.run.scores import CURVES, describe_best, describe_scores, keep_best, record_scores
from train.run.start import (
    Run,
    begin_files,
    count_images,
    count_parameters,
    find_checkpoint,
    finished,
    resume_from,
    set_up,
)
from train.run.step import training_step
from train.run.stopping import TerminatedError
from train.run.tracking import tracker
from train.run.transfer import on_device
from train.tasks import Metrics

PICTURES = 8  # rows of predictions.png
LOSS_WINDOW = 50  # steps over which final_losses are averaged
REPORT_EVERY = 10  # steps between two readings of the losses, each of which waits for the device


def train(flags: dict[str, Any], resume: str | None, argv: Sequence[str]) -> dict[str, Any]:
    """Train as ``flags`` say, write results.json, last, predictions.png and routing.png, and return the results, which
    name the command line ``argv``."""
    folder = find_checkpoint(flags, resume)
    state = checkpoint.read_state(folder) if folder else None
    if folder:
        flags = {"out": str(folder.parent), **flags}
    settings = resolve_settings(flags, state.settings if state else None)
    with processes():
        if "protocol" in flags and not settings.data:
            print(
                f"note      --protocol {settings.protocol} has no effect without --data: rendered scenes have their own"
            )
        run = set_up(settings, folder)
        with resumable(run):
            changed = []
            if folder and state:
                changed = resume_from(run, folder, state)
                if results := from_leader(lambda: finished(run)):
                    return results
            else:
                run.baselines = score_baselines(run)
            command = shlex.join(["python", "-m", "train", *argv])
            run.commands.append({"from_step": run.step, "command": command, "changed": changed})
            if leads():
                begin_files(run)
                keep_best(run)
            with tracker(run) as run.record.board:
                return finish(run, fit(run))


@contextmanager
def resumable(run: Run) -> Iterator[None]:
    """Hears SIGTERM; an end before the end says what to continue from."""
    try:
        with run.stopping.listening():
            yield
    except (KeyboardInterrupt, TerminatedError, BrokenPipeError):
        kept = f"continue from {run.out / run.written[-1]} with --resume" if run.written else "no checkpoint yet"
        if leads():
            print(f"\nstopped at step {run.step}: {kept}", file=sys.stderr)
        raise
    finally:
        if run.lock:
            run.lock.close()


def fit(run: Run) -> float:
    """Train from run.step to the end; images per second."""
    s, (train_set, _) = run.settings, run.data
    loader = train_loader(train_set, s.task_names, s.batch_size, range(run.step, run.total), s.seed, s.workers)
    pace, step = Pace(s.batch_size), GraphedStep(run) if s.cuda_graphs else partial(training_step, run)
    with progress_bar(run) as bar, run.stopping.held():
        if scores_due(run) and run.step not in run.record.scores:  # it ended while it was scored
            score_midway(run, bar)
        for batch in pace.watch(on_device(loader, run.device)):
            with routes.recorded(run):
                rate, result = run.learning_rate, step(batch)
            run.step += 1
            run.record.add_step(run.step, result.losses, result.extras, rate)
            pace.step()
            bar.update()
            if run.step % REPORT_EVERY == 0 or run.step == run.total:
                report(run, pace, bar)
            ends = agreed(run.stopping.requested)  # a SIGTERM that arrives from here on ends the next step
            if scores_due(run) or is_due(run) or ends:
                save(run)
            if ends:
                raise TerminatedError
            if scores_due(run):
                score_midway(run, bar)
    if pace.hint:
        print(f"note      {pace.hint}")
    return pace.speed


def scores_due(run: Run) -> bool:
    """Whether the model of this step is scored, by --eval-every; that of the last step is in any case."""
    every = run.settings.eval_every * schedule.steps_per_epoch(run.settings, len(run.data[0]))
    return bool(every) and 0 < run.step < run.total and run.step % every == 0


def score_midway(run: Run, bar: tqdm) -> None:
    """Score the model, record its scores and print them; a signal may end this."""
    with run.stopping.held(False):
        record_scores(run, score(run, f"step {run.step}")[0])
    with bar.external_write_mode():
        print(f"\n{describe_scores(run)}", flush=True)


def is_due(run: Run) -> bool:
    """Whether a checkpoint is due by the number of steps."""
    every = run.settings.checkpoint_every
    return run.step == run.total or bool(every) and run.step % every == 0


def progress_bar(run: Run) -> tqdm:
    """Drawn on terminals only; elsewhere :func:`report` prints lines."""
    return counter("train", run.total, run.step, "step")


def flush(run: Run) -> None:
    """Write the record; UserError for a loss that is not finite, which names task, images and remedy."""
    try:
        run.record.flush()
    except NotFiniteError as error:
        if run.settings.on_nonfinite == "skip":
            return
        s, train_set = run.settings, run.data[0]
        names = batch_ids(train_set, s.batch_size, error.step - 1, s.seed)
        kept = f"continue from {run.out}/last with --resume" if run.written else "start again"
        raise UserError(
            f"{error}, with images {', '.join(names)}: {kept} and a lower --lr, or pass --on-nonfinite skip"
        ) from None


def report(run: Run, pace: Pace, bar: tqdm) -> None:
    """Record the last steps and show their losses; a loss that is not finite ends the run."""
    speeds = {"images_per_second": pace.speed, "images_per_second_without_waiting": pace.appetite}
    run.record.add("pace", run.step, speeds)
    flush(run)
    losses = run.record.mean(REPORT_EVERY)
    text = "  ".join(f"{task} {loss:.3f}" for task, loss in losses.items()) + f"  {pace.speed:.0f} images/s"
    bar.set_postfix_str(text, refresh=False)
    if bar.disable and (run.step % max(run.total // 10, REPORT_EVERY) == 0 or run.step == run.total):
        print(f"step {run.step:>6}/{run.total}  {text}", flush=True)


def score(run: Run, title: str) -> tuple[Metrics, RoutingStatistics | None]:
    """The model's metrics over the validation set, and its routing."""
    s, val_set = run.settings, run.data[1]
    loader = eval_loader(val_set, s.task_names, s.batch_size, s.workers)
    with averaged(run.optimizer), run.computing():
        return validate(run.model, loader, val_set.classes, title)


def score_baselines(run: Run) -> dict[str, Metrics]:
    """The metrics of the model before training and of the best constant; none where they are not wanted."""
    if not run.settings.baselines:
        return {}
    untrained, _ = score(run, "baseline: untrained model")
    return {"untrained": untrained, "constant": constant_scores(run)}


def save(run: Run) -> None:
    """Write a checkpoint, whose losses and weights are finite."""
    flush(run)
    if not leads():
        return
    settings = asdict(run.settings) | {"out": ""}
    state = checkpoint.State(run.step, settings, run.baselines, run.images, run.written, run.commands)
    with averaged(run.optimizer):
        checkpoint.save(run.out, state, run.model, run.parts, run.settings.keep, run.best)
    run.written = state.written


def finish(run: Run, speed: float) -> dict[str, Any]:
    """Score, draw, write results.json and print the table."""
    metrics, routing = score(run, "evaluate")
    record_scores(run, metrics)
    results = results_of(run, speed, metrics)
    if not leads():
        return results
    draw(run, routing)
    write_json(run.out / "results.json", results)
    if len(run.record.scores) > 1:
        print(f"\n{describe_scores(run)}")
    print(f"\n{score_table(run.baselines | {'trained': metrics})}\n{count_images(run)}\n")
    pictures = (CURVES, "predictions.png", "routing.png")
    names = ["results.json", "last", checkpoint.BEST, NAME, *pictures, "tensorboard"]
    print(f"{run.out}/: {', '.join(name for name in names if (run.out / name).exists())}")
    return results


def results_of(run: Run, speed: float, metrics: Metrics) -> dict[str, Any]:
    s, (train_set, val_set) = run.settings, run.data
    height, width = s.image_shape
    total, trainable = count_parameters(run.model)
    config = s.moe_config or s.decoder_config
    return {
        "format": 1,
        "command": run.commands[-1]["command"],
        "commands": run.commands,
        "settings": asdict(s),
        "protocol": train_set.protocol.reported,
        "dataset": {
            "name": train_set.name,
            "train": len(train_set),
            "val": len(val_set),
            "image_size": s.image_size,
            "skipped": {"train": len(train_set.skipped), "val": len(val_set.skipped)},
        },
        "evaluation": describe_set(val_set, s.task_names, "val", f"{width} x {height}"),
        "model": describe_model(s),
        "moe": s.moe,
        "gating": config.gating_name if config and s.decoder != "plain" else None,
        "kernel": kernel_of(s, run.device),
        "seed": s.seed,
        "processes": world_size(),
        "steps": run.step,
        "skipped_steps": run.record.skipped,
        "images_per_second": round(speed, 2),
        "parameters": {"total": total, "trainable": trainable},
        "final_losses": run.record.mean(LOSS_WINDOW),
        "best": describe_best(run),
        "metrics": metrics,
        "metrics_constant": run.baselines.get("constant"),
        "metrics_untrained": run.baselines.get("untrained"),
        "versions": versions(),
    }


def describe_model(s: Settings) -> dict[str, Any]:
    backbone = {"backbone": "frozen" if s.frozen_backbone else "trained"}
    if s.decoder == "none":
        return {"name": s.model, "head": s.head, "site": s.site} | backbone
    fine = {"fg": s.fg, "fg_global": s.fg_global, "fg_mixer": s.fg_mixer} if s.decoder != "mlore" else {}
    return {"name": s.model, "decoder": s.decoder} | fine | backbone


@torch.inference_mode()
def draw(run: Run, routing: RoutingStatistics | None) -> None:
    """predictions.png for a few validation images of every group, and routing.png."""
    from train.output import pictures
    from train.output.routing import save_maps

    s, val_set = run.settings, run.data[1]
    indices = pictures.spread(val_set.groups, PICTURES)
    batch = collate([val_set[index, 0] for index in indices], s.task_names).to(run.device)
    run.model.eval()
    with averaged(run.optimizer), run.computing():
        predictions = {"predicted": run.model(batch.images)}
    pictures.save_predictions(run.out / "predictions.png", batch, predictions, val_set.classes)
    if routing is not None and s.moe_config is not None:
        mass, _ = routing.compute()
        save_maps(run.out / "routing.png", {"": mass}, run.model.tasks, s.moe_config.shared)
