"""Checkpoints: folders ``step-N/`` that are complete before they get their name, and ``last``, a link to the newest.

On a disk without links ``last`` is a file that holds the name step-N. Where it was lost, as copies to such disks, rsync
-r and zip lose it, the newest step-N is taken. ``best`` is such a link too, which a run with --keep-best has.

    model.safetensors   every parameter and buffer of the model
    training.pt         the states of optimiser, gradient scaler and random generators, tensors and numbers only
    state.json          see :class:`State`
    SHA256SUMS          the hash of each file above, as sha256sum writes it

An exported folder (:func:`publish`) has the state in config.json and no training.pt: it can be scored, not resumed.
A killed run leaves its last complete checkpoint. Weights that are not finite never get a name.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernels import UserError
from model import HEADS
from model.names import is_float
from train.files.atomic import remove_folder, remove_partials, replacing_folder, write_link
from train.files.folders import resolved
from train.files.reading import sha256_of
from train.tasks import TASKS

SUMS = "SHA256SUMS"
BEST = "best"
STATES = ("state.json", "config.json")  # of a checkpoint of a run, of an exported one
# Written into model.safetensors: a program that takes another order would mix up the experts.
LAYOUT = {"experts": "expert-major: expert e of rank r owns the rows e r .. (e + 1) r of lora_A (N r, in) and the same "
          "columns of lora_B (out, N r); row e of a router is its logit; shared experts are the last"}  # fmt: skip
STEP = re.compile(r"step-\d+")


@dataclass
class State:
    """What state.json holds: the run's settings, the metrics gathered before training, a fingerprint of the images of
    each split, the names of the checkpoints that the run has written, and the commands that trained it: each with the
    step that it began from and the settings that it changed."""

    step: int
    settings: dict[str, Any]
    baselines: dict[str, Any] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    commands: list[dict[str, Any]] = field(default_factory=list)


def save(
    out: Path, state: State, model: nn.Module, parts: dict[str, Any], keep: int = 1, best: int | None = None
) -> Path:
    """Write ``out/step-N``, point ``out/last`` at it, then :func:`prune` what the run wrote before.

    ``parts`` are objects with a state_dict, one of which is the optimiser. The new checkpoint joins ``state.written``.
    UserError where a weight is not finite, or the disk refuses.
    """
    folder = out / f"step-{state.step}"
    training = {name: part.state_dict() for name, part in parts.items()}
    _require_finite(folder, model.state_dict(), training["optimizer"])
    state.written = [name for name in state.written if name != folder.name] + [folder.name]
    with replacing_folder(folder) as partial, failed_writes():
        save_file(model.state_dict(), partial / "model.safetensors", LAYOUT)
        with (partial / "training.pt").open("wb") as file:
            torch.save(training | {"random": _random_states()}, file)
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
        _write_sums(partial)
    write_link(out / "last", folder.name)
    state.written = prune(out, state.written, keep, best)
    for name in ("step-*", "last", BEST):
        remove_partials(out, name)
    return folder


def prune(out: Path, written: list[str], keep: int, best: int | None) -> list[str]:
    """Removes the checkpoints ``written`` but for the newest ``keep`` and that of the step ``best``; returns those that
    stay."""
    kept = [name for name in written if name in (*written[-keep:], f"step-{best}")]
    for name in written:
        if name not in kept and STEP.fullmatch(name):  # from a file, so it may say anything
            remove_folder(out / name)
    return kept


def publish(folder: Path, state: State, to: Path) -> None:
    """Write the weights of the checkpoint ``folder``, with ``state`` as config.json, to the empty folder ``to``."""
    shutil.copyfile(_verified(folder, "model.safetensors"), to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(asdict(state), indent=1))
    _write_sums(to)


def _write_sums(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    (folder / SUMS).write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in names))


def _require_finite(folder: Path, weights: dict[str, Tensor], moments: dict[str, Any]) -> None:
    tensors = dict(weights)
    for number, values in moments["state"].items():
        tensors |= {f"{name} of parameter {number}": value for name, value in values.items()}
    wrong = _not_finite(tensors)
    if wrong:
        last = folder.with_name("last")
        remedy = f"continue from {last} with --resume and a lower --lr" if last.exists() else "start with a lower --lr"
        raise UserError(f"{wrong} is not finite, so {folder} is not written: {remedy}")


def _not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of a tensor that holds NaN or infinity; "" if there is none. The device is asked once."""
    names = [name for name, tensor in tensors.items() if torch.is_tensor(tensor) and tensor.is_floating_point()]
    if not names:
        return ""
    devices = {tensors[name].device for name in names}
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    finite = torch.stack([tensors[name].isfinite().all().to(device) for name in names]).tolist()
    return next((name for name, good in zip(names, finite, strict=True) if not good), "")


def _random_states() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


@contextmanager
def failed_writes() -> Iterator[None]:
    """Raises the OSError of a failed write, which safetensors and torch wrap in other exceptions."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def find(given: Path) -> Path:
    """The folder step-N, given a run's folder, its ``last`` or ``best``, or step-N itself."""
    run = given.parent if given.name == "last" and not given.is_dir() else given
    folder = newest(run)
    if folder is None and os.path.lexists(run / "last"):
        raise UserError(f"{run}/last points nowhere: give a folder step-N")
    return require_utf8(resolved(folder or _follow(given)))


def newest(run: Path) -> Path | None:
    """The checkpoint that ``run/last`` names or, where that is lost, the one of the most steps; None without any."""
    return next(
        (folder for folder in (_follow(run / "last"), *reversed(list_steps(run))) if is_checkpoint(folder)), None
    )


def _follow(link: Path) -> Path:
    """What a link names that is a file, as on a disk without links; otherwise the link itself."""
    if link.is_file() and STEP.fullmatch(name := link.read_text(encoding="utf-8", errors="replace").strip()):
        return link.with_name(name)
    return link


def list_steps(run: Path) -> list[Path]:
    """What is called step-N in a folder, by N, whether it is a checkpoint or not."""
    found = [path for path in run.iterdir() if STEP.fullmatch(path.name)] if run.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def is_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in STATES)


def require_utf8(path: Path) -> Path:
    """``path``; UserError where safetensors could not read a file in it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of {path} is not UTF-8, so that its weights cannot be read: rename it") from None
    return path


def require_link(out: Path) -> None:
    """UserError where ``last`` or ``best`` in ``out`` is a folder: a copy that followed the link, over which no link
    can be written."""
    for link in (out / "last", out / BEST):
        if link.is_dir() and not link.is_symlink():
            raise UserError(
                f"{link} is a folder and not a link to step-N, perhaps since it was copied: rename it step-N, by the "
                f"step in its state.json, and give that to --resume"
            )


def read_state(folder: Path) -> State:
    """The state of a checkpoint, or of an exported one."""
    file = next((name for name in STATES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} is not a checkpoint: give a folder step-N or last of an earlier run")
    with readable(folder):
        values = json.loads(_verified(folder, file).read_text(encoding="utf-8"))
        expected = {entry.name: entry for entry in fields(State)}
        if values.keys() != expected.keys():
            other = ", ".join(sorted(values.keys() ^ expected.keys()))
            raise ValueError(f"{file} is of another version, which differs in {other}")
        state = State(**values)
        kinds = {"step": int, "settings": dict, "baselines": dict, "images": dict, "written": list, "commands": list}
        wrong = [name for name, kind in kinds.items() if type(getattr(state, name)) is not kind]
        if wrong:
            raise ValueError(f"{file} has a wrong type of {', '.join(wrong)}")
        require_registered(folder, state.settings, state.commands)
        return state


def require_registered(source: Path, settings: dict[str, Any], commands: list[dict[str, Any]]) -> None:
    """UserError for a head or a task that is not known here: a script that was not imported defines it. The command
    of the run names the script."""
    used: list[tuple[str, Any, Collection[str]]] = [("head", settings.get("head"), HEADS)]
    used += [("task", task, TASKS) for task in filter(None, settings.get("tasks", "").split(","))]
    if missing := [f"{what} {name!r}" for what, name, known in used if name and name not in known]:
        words = shlex.split(commands[-1]["command"]) if commands else []
        files = [word for flag, word in pairwise(words) if flag == "--import"]
        script = " ".join(f"--import {file}" for file in files or ["FILE"])
        raise UserError(f"{source} has the {missing[0]}, which a script defines: add {script}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The model's parameters and buffers; UserError where one is not finite."""
    with readable(folder):
        path = _verified(folder, "model.safetensors")
        with safe_open(path, "pt") as file:
            if file.metadata() != LAYOUT:
                raise ValueError("model.safetensors does not say that its experts are in this program's order")
        weights = load_file(path)
    wrong = _not_finite(weights)
    if wrong:
        raise UserError(f"{wrong} in checkpoint {folder} is not finite: take an earlier one")
    return weights


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """``model.load_state_dict``; ValueError for tensors of another kind of number, such as quantised ones, which that
    would convert."""
    own = model.state_dict()
    wrong = [name for name in own if name in weights and own[name].is_floating_point() != is_float(weights[name])]
    if wrong:
        raise ValueError(f"{wrong[0]} is {weights[wrong[0]].dtype}")
    model.load_state_dict(weights)


def restore(folder: Path, model: nn.Module, parts: dict[str, Any]) -> None:
    """Load what :func:`save` wrote, random states too; the unpickler runs no code of the file."""
    weights = read_weights(folder)
    if not (folder / "training.pt").exists() and (folder / "config.json").exists():
        raise UserError(f"{folder} was exported without the optimiser's state: resume from the run it came from")
    with readable(folder):
        # Loaded to the CPU, since it may have been written on a device that is not here or is another process's.
        training = torch.load(_verified(folder, "training.pt"), map_location="cpu", weights_only=True)
        random = training["random"]
        load_weights(model, weights)
        for name, part in parts.items():
            part.load_state_dict(training[name])
        torch.set_rng_state(random["cpu"])
        if torch.cuda.is_available() and len(random["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(random["cuda"])


def _verified(folder: Path, name: str) -> Path:
    """The path of a file of the checkpoint, whose content is what was written; UserError where it is damaged."""
    if missing := [each for each in (SUMS, name) if not (folder / each).is_file()]:
        raise UserError(f"checkpoint {folder} is damaged: {missing[0]} is missing; take another one")
    sums = (folder / SUMS).read_text(encoding="ascii", errors="replace")
    known = {line[66:]: line[:64] for line in sums.splitlines()}
    if not re.fullmatch(r"([0-9a-f]{64}  [\w.]+\n)+", sums) or known.get(name) != sha256_of(folder / name):
        raise UserError(f"checkpoint {folder} is damaged: {name} does not have its hash in {SUMS}; take another one")
    return folder / name


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns any exception on the contents of a checkpoint, whose files are undamaged, into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # readers and models raise a dozen kinds on foreign content
        reason = " ".join(str(error).split())
        if "weights_only" in reason:  # torch advises to run the file's code
            reason = "training.pt holds more than tensors and numbers"
        raise UserError(f"checkpoint {folder} cannot be read: {reason[:200]}; take another one") from None
