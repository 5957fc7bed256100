"""Which experts the tasks chose in the course of a run, as pictures, numbers and a table."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastmoe_lora import MoEConfig, mutual_information_loss
from kernels import UserError
from train.files.atomic import write_json
from train.output.routing import save_curves, save_maps
from train.output.tables import format_table
from train.run import checkpoint
from train.run.backbone import settings_of
from train.run.routes import read_routing

EARLY = 3 / 40  # of the training; the paper shows epochs 1, 3 and 40
WRITTEN = ("fig4.png", "gate_mass.png", "routing.json")


def mutual_information(mass: Tensor) -> Tensor:
    """(layers,) nats: how much a token's task says about its expert, if an expert is drawn by its gate. ``mass``
    (layers, tasks, experts); tasks count alike, those without tokens not at all."""
    present = mass.isfinite().all(-1).all(0)
    shares = mass[:, present] / mass[:, present].sum(-1, keepdim=True)
    return -mutual_information_loss(shares)


@dataclass(frozen=True)
class Course:
    """What a run recorded: its experts, its tasks, and per step mass and frequency (layers, tasks, experts)."""

    config: MoEConfig
    tasks: tuple[str, ...]
    steps: dict[int, tuple[Tensor, Tensor]]


def read_course(folder: Path) -> Course:
    """What the run in ``folder`` recorded; UserError where that is nothing."""
    config = settings_of(checkpoint.find(folder)).moe_config
    if not config:
        raise UserError(f"{folder} has no experts in its backbone: give a run with --moe N/k/S/r")
    return Course(config, *read_routing(folder))


def draw_routing(course: Course, out: Path) -> str:
    """Draws fig4.png and gate_mass.png and writes routing.json to ``out``; returns the table."""
    shared, tasks = course.config.shared, course.tasks
    masses = {step: mass for step, (mass, _) in course.steps.items()}
    steps = list(masses)
    early = min(steps[1:] or steps, key=lambda step: abs(step - EARLY * steps[-1]))
    moments = {f"step {step}": masses[step] for step in dict.fromkeys((steps[0], early, steps[-1]))}
    save_maps(out / "fig4.png", moments, tasks, shared)
    information = torch.stack([mutual_information(mass) for mass in masses.values()])  # (steps, layers)
    on = torch.stack([mass[..., -shared:].sum(-1) for mass in masses.values()]) if shared else None
    save_curves(out / "gate_mass.png", steps, panels_of(on, information, tasks))
    numbers = {
        "tasks": tasks,
        "experts": str(course.config),
        "gating": course.config.gating_name,
        "steps": {str(step): {"mass": m.tolist(), "frequency": f.tolist()} for step, (m, f) in course.steps.items()},
        "mutual_information": {str(step): row for step, row in zip(steps, information.tolist(), strict=True)},
    }
    write_json(out / "routing.json", numbers)
    return table(steps, tasks, on, information)


def panels_of(on: Tensor | None, information: Tensor, tasks: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    """The lines of gate_mass.png, from the shared experts' gate mass (steps, layers, tasks), if there are any, and the
    mutual information (steps, layers)."""
    layers = tuple(f"layer {layer}" for layer in range(information.shape[1]))
    panels = {"mutual information of task and expert, nats": by_name(information, layers)}
    if on is None:
        return panels
    return {
        "gate mass of shared experts, mean over layers": by_name(on.nanmean(1), tasks),
        "gate mass of shared experts, mean over tasks": by_name(on.nanmean(2), layers),
    } | panels


def by_name(values: Tensor, names: tuple[str, ...]) -> dict[str, list[float]]:
    """(steps, names) as one list per name."""
    return dict(zip(names, values.T.tolist(), strict=True))


def table(steps: list[int], tasks: tuple[str, ...], on: Tensor | None, information: Tensor) -> str:
    """Per step the shared experts' gate mass of each task, if there are any, and the mutual information, means over the
    layers."""
    rows = [["step", *(f"shared, {task}" for task in tasks if on is not None), "mutual information"]]
    masses = [[]] * len(steps) if on is None else on.nanmean(1).tolist()
    for step, shares, nats in zip(steps, masses, information.mean(1).tolist(), strict=True):
        rows.append([str(step), *(f"{share:.3f}" for share in shares), f"{nats:.4f}"])
    return format_table(rows, text_columns=0)
