"""From the flags to a run that is ready for its next step: its folder, its objects and what it resumes from."""

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from fastmoe_lora.ranks import world_size
from kernels import UserError, nvtx, resolve_kernel
from model import EncoderDecoder, MLoREConfig, MultiTaskModel, MultiTaskViT
from train.config.settings import Settings
from train.datasets.base import DataSet, fingerprint
from train.datasets.cache import open_cache
from train.evaluation.results import Results, finished_results
from train.files.atomic import make_folder, probe, remove_partials, write_text
from train.files.folders import claim, lock, require_own, resolved
from train.run import build, checkpoint, schedule
from train.run.distributed import from_leader, leads, parallel
from train.run.optimizers import build_optimizer
from train.run.record import NAME, Line, Record, read_lines
from train.run.stopping import Stopping
from train.run.weighting import Weighting, build_weighting
from train.tasks import Metrics

OWNER = "train"
WRITTEN = (
    "results.json",
    "last",
    checkpoint.BEST,
    NAME,
    "curves.png",
    "predictions.png",
    "routing.png",
    "skipped.txt",
    "tensorboard",
    "wandb",
)


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
    weighting: Weighting
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    record: Record
    lock: IO[str] | None
    step: int = 0
    baselines: dict[str, Metrics] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    best: int | None = None  # step of the checkpoint that --keep-best keeps
    stopping: Stopping = field(default_factory=Stopping)
    commands: list[dict[str, Any]] = field(default_factory=list)  # see checkpoint.State
    drawn: float = field(default_factory=time.monotonic)  # when the curves were

    @property
    def total(self) -> int:
        return schedule.total_steps(self.settings, len(self.data[0]))

    @property
    def learning_rate(self) -> float:
        """That of the step to come."""
        return schedule.learning_rate(self.settings, self.step, self.total)

    def computing(self) -> torch.autocast:
        """A block in which products are computed in the type of --precision. Norms, softmax, losses and the residual
        stream are fp32 in all of them."""
        dtype = build.COMPUTE[self.settings.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model."""
        stateful = {"weighting": self.weighting} if self.weighting.state_dict() else {}
        return {"optimizer": self.optimizer, "scaler": self.scaler, **stateful}


def find_checkpoint(flags: dict[str, Any], resume: str | None) -> Path | None:
    """The checkpoint to continue from; None for a fresh run, also if the run of --out has not written one yet."""
    if resume is None:
        return None
    if resume:
        return checkpoint.find(Path(resume))
    if "out" not in flags:
        raise UserError("--resume alone does not say which run: give --out DIR, or --resume DIR/last")
    out = Path(flags["out"])
    checkpoint.require_link(out)
    folder, lost = checkpoint.newest(out), not os.path.lexists(out / "last")
    if folder and lost:
        print(f"{out}/last is lost: the run continues from {folder.name}, the newest there")
    if folder or not lost or (out / "results.json").exists():
        return checkpoint.find(out)
    print(f"{out} holds no checkpoint yet: the run begins at step 0")
    return None


def set_up(settings: Settings, folder: Path | None) -> Run:
    """Build data, model and optimiser, make the run's folder and print a summary."""
    if settings.nvtx:
        nvtx.enable()
    device = build.build_device(settings)
    build.require_possible(settings, device)
    from_leader(lambda: require_free(Path(settings.out or "runs"), folder))
    from_leader(lambda: open_cache(settings.cache))
    data = build.build_data(settings)
    images = from_leader(lambda: dict(zip(("train", "val"), map(fingerprint, data), strict=True)))
    model = build.build_model(settings, data[0].classes).to(device)
    if settings.deterministic and device.type == "cuda":
        # Bilinear resizes and cuBLAS have faster versions whose bits change from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if settings.compile and isinstance(model, MultiTaskViT):
        model.compile_training()
    weighting = build_weighting(settings).to(device)
    optimizer = build_optimizer(settings, model, weighting)
    out = from_leader(lambda: claim_folder(settings, folder))
    held = lock(out) if leads() else None
    for name in ("*.png", "*.json", "*.jsonl") if held else ():  # as a killed run left them
        remove_partials(out, name)
    # From 65,536, torch's default, the weighted losses would overflow, and the first steps would be skipped.
    scaler = torch.amp.GradScaler(device.type, init_scale=1024, enabled=settings.precision == "fp16")
    record = Record(out / NAME if leads() else None, model.tasks, earlier_lines(folder, model.tasks))
    run = Run(settings, out, device, data, images, model, parallel(model), weighting, optimizer, scaler, record, held)
    print(announce(run), flush=True)
    return run


def require_free(out: Path, folder: Path | None) -> None:
    """UserError where ``out`` is in a data set, holds another run than that of the checkpoint ``folder``, or a file
    that no run wrote where this one will write."""
    checkpoint.require_utf8(resolved(out))
    checkpoint.require_link(out)
    own = continues(out, folder)
    held = UserError(f"{out} already holds a run: continue it with --resume or choose another --out")
    if not own and (os.path.lexists(out / "last") or checkpoint.newest(out)):
        raise held
    foreign = (path.name for path in checkpoint.list_steps(out) if not checkpoint.is_checkpoint(path))
    require_own(out, OWNER, (*WRITTEN, *foreign), adopt=own)
    if not own and (out / "results.json").exists():
        raise held


def continues(out: Path, folder: Path | None) -> bool:
    """Whether the checkpoint ``folder`` is one of the run in ``out``."""
    return folder is not None and folder.parent == resolved(out)


def claim_folder(settings: Settings, folder: Path | None) -> Path:
    """The run's folder: --out, which no other run writes to, or the next free runs/NAME. What a disk lacks for
    checkpoints is found here, before training."""
    if settings.out:
        with lock(make_folder(Path(settings.out))):
            require_free(Path(settings.out), folder)  # another run may have come in between
    name = Path(settings.recipe or settings.source.dataset_name.lower()).stem
    adopt = continues(Path(settings.out), folder)
    out = claim(settings.out, OWNER, WRITTEN, f"runs/{name}", adopt, alone=False)  # set_up holds the lock of a run
    probe(out)
    return out


def earlier_lines(folder: Path | None, tasks: tuple[str, ...]) -> list[Line]:
    """The record of the steps before the checkpoint ``folder``, as far as they are known."""
    if folder is None or not (path := folder.parent / NAME).exists():
        return []
    return read_lines(path, tasks, until=checkpoint.read_state(folder).step)


def resume_from(run: Run, folder: Path, state: checkpoint.State) -> list[str]:
    """Take over everything that the checkpoint holds; returns the settings that change. UserError where the images are
    others, or it is of a later step than the last of this run."""
    if state.images != run.images:
        raise UserError(
            f"the images or labels are not those that {folder} was trained on: give the --data it was started with"
        )
    if state.step > run.total:
        raise UserError(f"{folder} is at step {state.step} of {run.total} already: raise --steps or --epochs")
    checkpoint.restore(folder, run.model, run.parts)
    run.step, run.baselines, run.commands = state.step, state.baselines, state.commands
    run.written = state.written if continues(run.out, folder) else []
    now = asdict(run.settings) | {"out": ""}  # as in the checkpoint, which may be copied
    changed = [f"{name} {old} -> {now[name]}" for name, old in state.settings.items() if old != now[name]]
    notes = [text for text in changed if text.split()[0] not in ("workers", "device", "kernel")]
    print(f"resumed   from step {state.step} of {folder}" + (f"; changed: {', '.join(notes)}" if notes else ""))
    return changed


def finished(run: Run) -> Results | None:
    """The results of a run of which nothing is left to do; None where steps, or the scores of the last, are missing."""
    results = finished_results(run.out, run.step) if run.step == run.total else None
    if results:
        print(f"finished  {run.out} has its {run.total} steps and their results: more come with --steps or --epochs")
    return results


def begin_files(run: Run) -> None:
    """Start the record from the steps before, and say which images are left out."""
    run.record.begin()
    skipped = [fault for dataset in run.data for fault in dataset.skipped]
    if skipped:
        write_text(run.out / "skipped.txt", "\n".join(skipped) + "\n")


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
