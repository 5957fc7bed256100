"""From the flags to a run that is ready for its next step: its folder, its objects and what it resumes from."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch

from fastmoe_lora.ranks import world_size
from kernels import UserError, nvtx, resolve_kernel
from model import EncoderDecoder, MLoREConfig, MultiTaskModel, MultiTaskViT
from train.config.settings import Settings
from train.datasets.base import DataSet, fingerprint
from train.files.atomic import make_folder, remove_partials, write_text
from train.files.folders import lock, require_outside_data
from train.run import build, checkpoint, schedule
from train.run.distributed import from_leader, leads, parallel
from train.run.losses import LossLog, read_losses
from train.run.stopping import Stopping
from train.tasks import Metrics


@dataclass
class Run:
    """The state of a run; ``images`` is a fingerprint of each split, and ``baselines`` are the metrics of the untrained
    model and of the best constant.

    ``parallel`` is the model for training steps. Of several processes only the first holds the lock.
    """

    settings: Settings
    out: Path
    device: torch.device
    data: tuple[DataSet, DataSet]
    images: dict[str, str]
    model: MultiTaskModel
    parallel: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    losses: LossLog
    lock: IO[str] | None
    step: int = 0
    baselines: dict[str, Metrics] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    stopping: Stopping = field(default_factory=Stopping)
    commands: list[dict[str, Any]] = field(default_factory=list)  # see checkpoint.State

    @property
    def total(self) -> int:
        return schedule.total_steps(self.settings, len(self.data[0]))

    def computing(self) -> torch.autocast:
        """A block in which products are computed in the type of --precision. Norms, softmax, losses and the residual
        stream are fp32 in all of them."""
        dtype = build.COMPUTE[self.settings.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model."""
        return {"optimizer": self.optimizer, "scaler": self.scaler}


def find_checkpoint(flags: dict[str, Any], resume: str | None) -> Path | None:
    """The checkpoint to continue from; None for a fresh run, also if the run of --out has not written one yet."""
    if resume is None:
        return None
    if resume:
        return checkpoint.find(Path(resume))
    if "out" not in flags:
        raise UserError("--resume alone does not say which run: give --out DIR, or --resume DIR/last")
    out = Path(flags["out"])
    if (out / "last").is_symlink() or (out / "results.json").exists():
        return checkpoint.find(out)
    checkpoint.require_link(out)
    print(f"{out} holds no checkpoint yet: the run begins at step 0")
    return None


def set_up(settings: Settings, folder: Path | None) -> Run:
    """Build data, model and optimiser, make the run's folder and print a summary."""
    if settings.nvtx:
        nvtx.enable()
    device = build.build_device(settings)
    build.require_possible(settings, device)
    from_leader(lambda: require_free(Path(settings.out or "runs"), folder))
    data = build.build_data(settings)
    images = from_leader(lambda: dict(zip(("train", "val"), map(fingerprint, data), strict=True)))
    model = build.build_model(settings, data[0].classes).to(device)
    if settings.deterministic and device.type == "cuda":
        # Bilinear resizes and cuBLAS have faster versions whose bits change from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if settings.compile and isinstance(model, MultiTaskViT):
        model.compile_training()
    out = from_leader(lambda: claim_folder(settings, folder))
    held = lock(out) if leads() else None
    for name in ("*.png", "*.csv", "*.json") if held else ():  # as a killed run left them
        remove_partials(out, name)
    skipped = [fault for dataset in data for fault in dataset.skipped]
    if skipped and leads():
        write_text(out / "skipped.txt", "\n".join(skipped) + "\n")
    # From 65,536, torch's default, the weighted losses would overflow, and the first steps would be skipped.
    scaler = torch.amp.GradScaler(device.type, init_scale=1024, enabled=settings.precision == "fp16")
    losses = LossLog(out / "losses.csv" if leads() else None, model.tasks, earlier_losses(folder, model.tasks))
    optimizer = build.build_optimizer(settings, model)
    run = Run(settings, out, device, data, images, model, parallel(model), optimizer, scaler, losses, held)
    print(announce(run), flush=True)
    return run


def require_free(out: Path, folder: Path | None) -> None:
    """UserError where ``out`` is in a data set or holds another run than that of the checkpoint ``folder``."""
    require_outside_data(out)
    checkpoint.require_utf8(out.resolve())
    checkpoint.require_link(out)
    own = folder is not None and folder.parent == out.resolve()
    if not own and any((out / name).exists() for name in ("last", "results.json")):
        raise UserError(f"{out} already holds a run: continue it with --resume or choose another --out")


def claim_folder(settings: Settings, folder: Path | None) -> Path:
    """The run's folder: --out, which no other run writes to, or the next free runs/NAME."""
    if settings.out:
        out = make_folder(Path(settings.out))
        with lock(out):
            require_free(out, folder)  # another run may have come in between
        return out
    name = Path(settings.recipe or settings.source.protocol.dataset.lower()).stem
    make_folder(Path("runs"))
    for n in count(1):
        out = Path("runs") / (name if n == 1 else f"{name}-{n}")
        with suppress(FileExistsError):
            out.mkdir()
            return out
    raise AssertionError("count() does not end")


def earlier_losses(folder: Path | None, tasks: tuple[str, ...]) -> dict[int, tuple[float, ...]]:
    """The losses of the steps before the checkpoint ``folder``, as far as they are known."""
    if folder is None or not (path := folder.parent / "losses.csv").exists():
        return {}
    return read_losses(path, checkpoint.read_state(folder).step, tasks)[1]


def resume_from(run: Run, folder: Path, state: checkpoint.State) -> list[str]:
    """Take over everything that the checkpoint holds; returns the settings that change. UserError where the images are
    others, or nothing is left."""
    if state.images != run.images:
        raise UserError(
            f"the images or labels are not those that {folder} was trained on: give the --data it was started with"
        )
    if state.step >= run.total and (run.out / "results.json").exists():
        raise UserError(f"{folder} is at step {state.step} of {run.total} already: raise --steps or --epochs")
    checkpoint.restore(folder, run.model, run.parts)
    run.step, run.baselines, run.commands = state.step, state.baselines, state.commands
    run.written = state.written if folder.parent == run.out.resolve() else []
    now = asdict(run.settings) | {"out": ""}  # as in the checkpoint, which may be copied
    changed = [f"{name} {old} -> {now[name]}" for name, old in state.settings.items() if old != now[name]]
    notes = [text for text in changed if text.split()[0] not in ("workers", "device", "kernel")]
    print(f"resumed   from step {state.step} of {folder}" + (f"; changed: {', '.join(notes)}" if notes else ""))
    return changed


def announce(run: Run) -> str:
    s, train_set = run.settings, run.data[0]
    total, trainable = count_parameters(run.model)
    height, width = s.image_shape
    side = f"{height}" if height == width else f"{width} x {height}"
    return "\n".join(
        [
            f"data      {train_set.name}: {count_images(run)} at {side} px, protocol {train_set.protocol.reported}",
            f"model     {s.model}, {describe_outputs(s)} for {', '.join(s.task_names)}: "
            f"{total / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trainable; {describe_backbone(run)}",
            describe_experts(s, run.device),
            f"run       {run.total} steps of {s.batch_size} images on {describe_devices(run)} -> {run.out}",
        ]
    )


def describe_devices(run: Run) -> str:
    return f"{run.device}" if world_size() == 1 else f"{world_size()} processes, {run.device.type}"


def describe_outputs(s: Settings) -> str:
    return f"{s.head} heads" if s.decoder == "none" else f"{s.decoder} decoder"


def describe_backbone(run: Run) -> str:
    s, model = run.settings, run.model
    if isinstance(model, EncoderDecoder):
        return f"encoder frozen, one pass per {'image and task' if model.per_task else 'image'}"
    if not s.pretrained:
        return "no --pretrained, so the backbone is trained in full"
    return "backbone frozen" if s.frozen_backbone else "backbone trained in full"


def describe_experts(s: Settings, device: torch.device) -> str:
    """The line of the summary on the experts, wherever they are."""
    default = "" if s.gating else " (default)"
    if moe := s.moe_config:
        kernel = resolve_kernel(s.kernel, device)
        return f"moe       {moe}, gating {moe.gating_name}{default}, site {s.site}, kernel {kernel}"
    if not (decoder := s.decoder_config):
        return "moe       none"
    without = "".join(f", no {part}" for part in ("global", "mixer") if not getattr(s, f"fg_{part}"))
    if isinstance(decoder, MLoREConfig):
        ranks = f"{len(decoder.ranks)} experts of ranks {decoder.ranks[0]} to {decoder.ranks[-1]}"
        return f"decoder   mlore: {ranks}, {decoder.active} active, gating {decoder.gating_name}{default}"
    if s.decoder == "plain":
        return f"decoder   plain: fgmoe {decoder} without gates{without}"
    gating, kernel = f"gating {decoder.gating_name}{default}", resolve_kernel(s.kernel, device)
    return f"decoder   fgmoe (a reconstruction): {decoder}, {gating}{without}, kernel {kernel}"


def count_images(run: Run) -> str:
    """How many images of each split are used and, where some are not, how many are skipped."""
    train_set, val_set = run.data
    text = f"{len(train_set)} train, {len(val_set)} val images"
    skipped = len(train_set.skipped), len(val_set.skipped)
    return f"{text} ({skipped[0]} and {skipped[1]} skipped, see skipped.txt)" if any(skipped) else text


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(total, trainable)."""
    return (sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad))
