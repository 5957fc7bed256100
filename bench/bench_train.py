"""The full training step, five tasks: with our experts, with none (plain LoRA), and with a loop over experts.

ViT-B at 224 pixels, batches of 8, on a GPU; ViT-Ti, one image, on a CPU. Every image is labelled for every task. The
loader is timed separately, on rendered scenes of the same size with one worker.
"""

import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import measure
from bench.peers.base import Forward, Layer, batch_of, parts_of, rows_of
from bench.peers.baselines import loop
from fastmoe_lora import LoRAMoE
from kernels import reference, resolve_kernel
from model import MultiTaskViT
from model.backbone import FeatureMap
from train.config.settings import Settings, resolve_settings
from train.datasets.batches import Batch, collate
from train.datasets.scenes.dataset import Scenes
from train.run.start import Run, set_up
from train.run.step import training_step

ON_GPU = torch.cuda.is_available()
MODEL = (
    {"model": "vit_base", "head": "up", "batch_size": 8, "precision": "bf16"}
    if ON_GPU
    else {"model": "vit_tiny", "head": "light", "batch_size": 1, "precision": "fp32"}
)
SUBJECTS = {
    "ours": {},
    "reference": {"kernel": "reference"},
    "plain-lora": {"moe": "none"},
    "expert-loop": {"kernel": "reference"},
}
PAPER_IMAGES = 40 * 4_998  # epochs times training images


def settings_of(subject: str, kernel: str, out: str) -> Settings:
    values = {"image_size": 224, "scenes": 64, "val_scenes": 1, "lora_rank": 4, "out": out, "kernel": kernel}
    return resolve_settings(values | MODEL | SUBJECTS[subject])


def run_loops(model: torch.nn.Module) -> None:
    """Every adapted layer as a loop over its experts, with the statistics that the loss needs."""
    for layer in [module for module in model.modules() if isinstance(module, LoRAMoE)]:
        layer.forward = looped(layer)  # this layer alone becomes a loop


def looped(layer: Layer) -> Forward:
    experts = loop(layer)

    def forward(x: Tensor) -> Tensor:
        tokens, rows = x.to(layer.fc1.weight.dtype).flatten(0, -2), rows_of(layer, x.flatten(0, -2))
        z = reference.router_logits(tokens, layer.routers, rows)
        adapter, _, routing = parts_of(layer)
        routing.record(batch_of(layer), adapter.layer, reference.mean_probs(z, rows), z, rows)
        return experts(tokens).view_as(x)

    return forward


def freeze(run: Run) -> None:
    """The backbone as --pretrained leaves it: frozen but for its adapters."""
    assert isinstance(run.model, MultiTaskViT)
    for name, parameter in run.model.vit.named_parameters():
        parameter.requires_grad_("lora_" in name or "routers" in name)


def heads_seconds(run: Run, batch: Batch) -> float:
    """Seconds of the forward and backward pass of the heads alone."""
    model = run.model
    assert isinstance(model, MultiTaskViT)
    size, vit = batch.images.shape[-1], model.vit
    grid = (size // vit.patch,) * 2
    tokens = torch.randn(len(batch.images), 1 + grid[0] * grid[1], vit.width, device=run.device, requires_grad=True)

    def step():
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings.precision == "bf16"):
            outputs = [head([FeatureMap(tokens, grid)]) for head in model.heads.values()]
        torch.autograd.backward([output.float().sum() for output in outputs])

    return measure.summary(measure.paired({"heads": step}, 0.2, run.device)["heads"])["median"]


def loader_images_per_second(settings: Settings) -> float:
    """Images per second of one worker, in this process."""
    scenes, count = Scenes("train", 224, 64, 0, settings.task_names), 16
    start = time.perf_counter()
    collate([scenes[i, 0] for i in range(count)], settings.task_names)
    return count / (time.perf_counter() - start)


@pytest.mark.parametrize("subject", SUBJECTS)
def bench_training_step(benchmark: BenchmarkFixture, kernel: str, subject: str, tmp_path: Path) -> None:
    settings = settings_of(subject, kernel, str(tmp_path))
    run = set_up(settings, None)
    freeze(run)
    if subject == "expert-loop":
        run_loops(run.model)
    batch = collate([run.data[0][i, 0] for i in range(settings.batch_size)], settings.task_names).to(run.device)

    def step():
        run.step = 1  # so that every round has the same learning rate
        training_step(run, batch)

    seconds = measure.summary(measure.paired({"step": step}, float(benchmark._max_time), run.device)["step"])
    speed = settings.batch_size / seconds["median"]
    benchmark.group = f"training step, {settings.model}, {settings.batch_size} images, {run.device.type}"
    benchmark.extra_info |= {
        "suite": "train",
        "subject": subject,
        "model": settings.model,
        "seconds": seconds,
        "images_per_second": speed,
        "kernel": resolve_kernel(settings.kernel, run.device),
        "peak_bytes": measure.peak_bytes(step) if ON_GPU else None,
        "heads_share": heads_seconds(run, batch) / seconds["median"],
        "loader_images_per_second": loader_images_per_second(settings),
        "paper_minutes": PAPER_IMAGES / speed / 60,
    }
    benchmark.pedantic(step, rounds=1)
