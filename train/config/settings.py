"""All settings of a run, and the layers that their values come from.

Later layers win: the defaults below (the paper's setting), the checkpoint that is resumed, a recipe, the flags.
"""

import difflib
import typing
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from fastmoe_lora import MoEConfig
from kernels import KERNELS, UserError
from model import HEADS, NORMALISATIONS, VITS, FGConfig, MLoREConfig, is_repository
from model.timm_backbone import PREFIX, width_of
from train.config.values import convert, load_yaml
from train.datasets.base import CLASSES, Source, kind_of
from train.datasets.files import Access
from train.protocols import PROTOCOLS, build_protocol
from train.tasks import DEFAULT_TASKS, TASKS, Shape, parse_tasks

SITES = ("ffn", "fc1", "fc2")  # what gets experts, and what plain LoRA; the backbone has the patterns of their names
LORA_TARGETS = ("qkv", "proj", "fc1", "fc2")
DECODERS = ("none", "fgmoe", "plain", "mlore")
PRECISIONS = ("fp32", "bf16", "fp16")
CHOICES: dict[str, Collection[str]] = {
    "model": VITS,
    "head": HEADS,
    "decoder": DECODERS,
    "site": SITES,
    "kernel": KERNELS,
    "precision": PRECISIONS,
    "normalisation": ("", *NORMALISATIONS),
    "protocol": PROTOCOLS,
    "dataset": ("", *CLASSES),
    "device": ("", "cpu", "cuda"),
    "on_nonfinite": ("stop", "skip"),
    "tracker": ("tensorboard", "wandb", "none"),
}
MANY = 10**9
# Least and largest value of every number.
BOUNDS: dict[str, tuple[float, float]] = {
    "decoder_width": (0, 4096),
    "lora_rank": (0, 4096),
    "mi_weight": (0, 1e6),
    "balance_weight": (0, 1e6),
    "image_size": (0, 16_384),
    "epochs": (0, MANY),
    "steps": (0, MANY),
    "batch_size": (1, 65_536),
    "lr": (0, 1e6),
    "backbone_lr": (0, 1e3),
    "weight_decay": (0, 1e6),
    "warmup": (0, 1),
    "clip_norm": (1e-9, 1e9),
    "eval_every": (0, MANY),
    "routing_every": (0, MANY),
    "checkpoint_every": (0, MANY),
    "keep": (1, MANY),
    "accumulate": (1, 65_536),
    "scenes": (1, 10**7),
    "val_scenes": (1, 10**7),
    "seed": (0, 2**63 - 1),
    "workers": (0, 1024),
}
LARGEST_WEIGHT = 1e6  # of a task's loss
# The weights, batches and baselines of a checkpoint depend on these: with another value it would be another run.
FIXED_ON_RESUME = (
    "tasks",
    "model",
    "head",
    "decoder",
    "decoder_width",
    "fg",
    "fg_global",
    "fg_mixer",
    "moe",
    "gating",
    "site",
    "lora_rank",
    "lora_targets",
    "train_backbone",
    "image_size",
    "batch_size",
    "optimizer",
    "weighting",
    "seed",
    "normalisation",
    "protocol",
    "partial_labels",
    "skip_bad",
    "baselines",
    "scenes",
    "val_scenes",
)


@dataclass(frozen=True)
class Settings:
    """The settings of one run. ``--set name=value`` sets any field; many fields also have a flag."""

    tasks: str = ",".join(DEFAULT_TASKS)
    data: str = ""
    dataset: str = ""  # found from the data; it names the classes of a checkpoint
    val_images: str = ""
    protocol: str = "ase"
    partial_labels: bool = False
    skip_bad: bool = False
    cache: str = ""
    pretrained: str = ""
    train_backbone: bool = False  # also where it is pretrained
    backbone_lr: float = 1.0  # times lr, of a backbone that is pretrained and trained
    normalisation: str = ""
    recipe: str = ""
    model: str = "vit_base"
    head: str = "up"
    decoder: str = "none"
    decoder_width: int = 0  # channels of a decoder; 0 means its default
    fg: str = "4/2/4/1"
    fg_global: bool = True
    fg_mixer: bool = True
    moe: str = "16/3/1/4"
    gating: str = ""
    site: str = "ffn"
    kernel: str = "auto"
    deterministic: bool = False
    lora_rank: int = 4
    lora_targets: str = "qkv,proj"
    mi_weight: float = 0.005
    balance_weight: float = 1e-4
    image_size: int = 0
    epochs: int = 40
    steps: int = 0
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 1e-4
    warmup: float = 0.05
    clip_norm: float = 10.0
    loss_weights: str = ",".join(f"{name}={TASKS[name].weight}" for name in DEFAULT_TASKS)
    weighting: str = "fixed"
    precision: str = "fp32"
    compile: bool = False
    cuda_graphs: bool = False
    on_nonfinite: str = "stop"
    baselines: bool = True  # score the model before training, and the best constant
    eval_every: int = 5
    routing_every: int = 0  # steps between two records of the routing; 0: none
    checkpoint_every: int = 0
    keep: int = 1
    keep_best: str = ""  # the score whose best checkpoint is kept: delta_m or TASK/KEY; "": none
    scenes: int = 12_800
    val_scenes: int = 240
    seed: int = 0
    workers: int = 1
    device: str = ""
    nvtx: bool = False
    tracker: str = "tensorboard"
    wandb_project: str = "fastmoe_lora"
    out: str = ""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices and not (name == "model" and self.of_timm):
                raise UserError(
                    f"unknown {name} {getattr(self, name)!r}: choose among {', '.join(filter(None, choices))}"
                )
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:  # also false for nan
                raise UserError(f"{name} is {value}: it must be between {least:g} and {most:g}")
        if not (self.epochs or self.steps):
            raise UserError("epochs and steps are both 0: say how long to train with --epochs or --steps")
        if self.decoder != "none" and self.moe != "none":
            raise UserError(f"--moe {self.moe} adapts the backbone, which --decoder {self.decoder} freezes: drop --moe")
        if self.compile and self.decoder != "none":
            raise UserError(f"--compile compiles an adapted backbone, and --decoder {self.decoder} has none: drop one")
        if self.compile and self.of_timm:
            raise UserError(f"--compile is for our own ViTs: leave it out with --model {self.model}")
        if 0 < self.decoder_width < 4:
            raise UserError(f"decoder_width is {self.decoder_width}: it must be at least 4, or 0 for the default")
        if self.train_backbone and self.decoder != "none":
            raise UserError(f"--decoder {self.decoder} freezes its encoder: drop --set train_backbone=true")
        # Fail on a wrong tuple, task or weight now, not when the value is first used.
        _ = (
            self.moe_config,
            self.lora_layers,
            self.decoder_config,
            self.task_names,
            self.task_weights,
            self.image_shape,
        )

    @cached_property
    def task_names(self) -> tuple[str, ...]:
        return parse_tasks(self.tasks)

    @cached_property
    def moe_config(self) -> MoEConfig | None:
        return None if self.moe == "none" else MoEConfig.parse(self.moe, self.gating)

    @cached_property
    def lora_layers(self) -> list[str]:
        """Which linear layers get plain LoRA; none if its rank is 0."""
        targets = self.lora_targets.split(",") if self.lora_rank else []
        for target in targets:
            if target not in LORA_TARGETS:
                raise UserError(f"unknown LoRA target {target!r}: choose among {', '.join(LORA_TARGETS)}")
        return targets

    @cached_property
    def decoder_config(self) -> FGConfig | MLoREConfig | None:
        if self.decoder == "none":
            return None
        if self.decoder == "mlore":
            width = width_of(self.model) if self.of_timm else VITS[self.model].width
            return MLoREConfig.of(width, self.gating, self.decoder_width)
        return FGConfig.parse(self.fg, self.gating if self.decoder == "fgmoe" else "", self.decoder_width)

    @property
    def of_timm(self) -> bool:
        """Whether the backbone is a model of timm."""
        return self.model.startswith(PREFIX)

    @property
    def frozen_backbone(self) -> bool:
        return bool(self.pretrained) and not self.train_backbone

    @property
    def regulariser_weights(self) -> dict[str, float]:
        return {"mi": self.mi_weight, "balance": self.balance_weight}

    @cached_property
    def task_weights(self) -> dict[str, float]:
        """Loss weight per task; a task that is not named keeps its default."""
        return {name: task.weight for name, task in TASKS.items()} | parse_loss_weights(self.loss_weights)

    @cached_property
    def source(self) -> Source:
        """Where the images of the run come from."""
        access = Access(self.partial_labels, self.cache, self.skip_bad, self.workers, self.val_images)
        scenes = {"train": self.scenes, "val": self.val_scenes}
        return Source(
            self.data, self.task_names, self.protocol, self.image_size, self.seed, scenes, access, self.dataset
        )

    @property
    def image_shape(self) -> Shape:
        """(height, width) of the model's input: ``image_size`` is the height, the protocol gives the aspect ratio."""
        return self.source.protocol.shape


def parse_loss_weights(text: str) -> dict[str, float]:
    """``"seg=1,edge=50"`` -> ``{"seg": 1.0, "edge": 50.0}``."""
    weights = {}
    for entry in text.split(","):
        name, _, value = entry.partition("=")
        (task,) = parse_tasks(name)
        try:
            weights[task] = float(value)
        except ValueError:
            raise UserError(f"loss weight {entry!r} is not of the form task=number, for example edge=50") from None
        if not 0 <= weights[task] <= LARGEST_WEIGHT:
            raise UserError(f"loss weight {entry!r}: it must be between 0 and {LARGEST_WEIGHT:g}")
    return weights


def layer(values: dict[str, Any], source: str) -> dict[str, Any]:
    """One layer of values, checked and converted to the fields' types; ``source`` names it in errors.

    ``epochs`` in a layer overrides ``steps`` of the layers below it, and the reverse.
    """
    fields = typing.get_type_hints(Settings)
    converted = {}
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(fields)}"
            raise UserError(f"{source}: unknown key {name!r}; {hint}")
        converted[name] = convert(name, value, fields[name], source)
    for given, other in (("epochs", "steps"), ("steps", "epochs")):
        if given in converted and other not in values:
            converted[other] = 0
    return converted


def recipe_names() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in _recipes().iterdir())


def list_recipes() -> list[list[str]]:
    """[name, first sentence of the yaml file's heading] of each."""
    headings = {name: _recipe_path(name).read_text(encoding="utf-8").partition("\n#\n")[0] for name in recipe_names()}
    return [[name, " ".join(text.replace("#", " ").split())] for name, text in headings.items()]


def _recipes():
    return resources.files("train.config") / "recipes"


def _recipe_path(name: str) -> Any:
    """The path of a shipped recipe, in whose name - and _ are the same, or of a yaml file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _recipes() / f"{name.replace('-', '_')}.yaml"
    if not path.is_file():
        raise UserError(f"no recipe {name!r}: give the path of a .yaml file or one of {', '.join(recipe_names())}")
    return path


def read_recipe(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a shipped recipe by name, or of a yaml file by path: its own, and those of its ``base`` below.
    ``above`` are the recipes that it is the base of; UserError where it is one of them."""
    if name in above:
        raise UserError(f"recipe {name} is based on itself: drop a 'base' of {' -> '.join((*above, name))}")
    own = own_values(name)
    base = own.pop("base", "")
    return {**(read_recipe(base, (*above, name)) if base else {}), **own}


def own_values(name: str) -> dict[str, Any]:
    """What a recipe's file holds. Its key ``base`` names the recipe that it is a change of."""
    path = _recipe_path(name)
    try:
        values = load_yaml(path.read_text(encoding="utf-8"), f"recipe {path}")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} holds no 'key: value' lines")
    base = {"base": str(values.pop("base"))} if "base" in values else {}
    return base | layer(values, f"recipe {path}")


def resolve_settings(flags: dict[str, Any], checkpoint: dict[str, Any] | None = None) -> Settings:
    """Settings of a run from its flags and, where it resumes, from the settings in its checkpoint.

    Without a protocol the data set's usual one applies. An image size of 0 becomes the protocol's default size. A
    decoder replaces the default experts of the backbone, and its checkpoint needs the encoder's weights, whose path
    becomes absolute.
    """
    flags = layer(flags, "command line")
    below = checkpoint and asdict(Settings(**layer(checkpoint, "the checkpoint"))) or {}
    recipe = flags.get("recipe", "")
    if not recipe and checkpoint is None and not flags.get("data"):
        recipe = "scenes"
    values = {**below, **(read_recipe(recipe) if recipe else {}), **flags}
    if recipe:
        values["recipe"] = recipe
    kind = kind_of(values.get("data", ""))
    values.setdefault("protocol", kind.protocol if kind else Settings.protocol)
    values["dataset"] = kind.name if kind else below.get("dataset", "")
    if not values.get("image_size"):
        values["image_size"] = build_protocol(values["protocol"]).size
    if values.get("decoder", "none") != "none":
        values.setdefault("moe", "none")
        if values.get("pretrained") and not is_repository(values["pretrained"]):
            values["pretrained"] = str(Path(values["pretrained"]).absolute())
    if below:
        _require_same_run(below, values)
    return Settings(**values)


def _require_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError where a value that is fixed changes. A tree may have moved, but does not become rendered scenes."""
    for name in FIXED_ON_RESUME:
        if now[name] != before[name]:
            raise UserError(f"{name} was {before[name]!r} and cannot become {now[name]!r} when a run is resumed")
    if bool(now["data"]) != bool(before["data"]):
        raise UserError(f"data was {before['data']!r} and cannot become {now['data']!r} when a run is resumed")
