"""Models of timm as backbones, by the name ``timm:NAME``."""

import difflib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from kernels import UserError
from model.backbone import TAPS, Backbone, FeatureMap, Level, Pairs, spaced
from model.names import is_float
from model.weights import NORMALISATIONS, LoadReport, Source

PREFIX = "timm:"
# How timm's models are asked to take images of a size: the first arguments that a model knows. The last take any size.
SIZES: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
LORA_LAYERS = {
    "qkv": ("*.attn.qkv", "*.attn.q_proj", "*.attn.k_proj", "*.attn.v_proj"),
    "proj": ("*.attn.proj",),
    "fc1": ("*.mlp.fc1", "*.mlp.fc1_g", "*.mlp.fc1_x"),
    "fc2": ("*.mlp.fc2",),
}
_PASS = threading.local()  # the embeddings of this thread's pass, for the hook of a stage inside a timm model


class TimmBackbone(Backbone):
    """Four maps of a model of timm: of evenly spaced blocks of a ViT, or of the last stages of a hierarchical model.

    The embedding of its task is added to the input of the first block, or of the first stage whose map is read. What
    comes before runs for every pair too, since timm's models take the batch size from the images.
    """

    sites = {"ffn": None, "fc1": "*.mlp.fc1", "fc2": "*.mlp.fc2"}

    def __init__(self, name: str, shape: tuple[int, int]) -> None:
        super().__init__()
        self.name, (self.net, self.only_shape) = name, _create(name, shape)
        strides = [info["reduction"] for info in self.net.feature_info]
        flat = len(set(strides)) == 1
        self.read = sorted(set(spaced(len(strides)))) if flat else [*range(len(strides))][-TAPS:]
        self.patch = max(strides)
        if wrong := [side for side in shape if side % self.patch]:
            raise UserError(f"image size {wrong[0]} is not a multiple of the patch size {self.patch} of {name}")
        try:
            self.net.prune_intermediate_layers(self.read)
            stage = self.net.get_submodule(self.net.feature_info[0 if flat else self.read[0]]["module"])
            self._measure(stage, shape)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise UserError(f"{name} gives no normalised maps ({error}): choose another --model") from None
        stage.register_forward_pre_hook(_add_embeddings)
        names = [module for module, _ in self.net.named_modules()]
        self.lora_layers = {
            layer: tuple(p for p in patterns if any(fnmatchcase(module, p) for module in names))
            for layer, patterns in LORA_LAYERS.items()
        }
        for module in self.net.modules():
            if hasattr(module, "qkv_bias_separate"):  # of EVA and BEiT: they call the layer qkv, and LoRA runs
                module.qkv_bias_separate = True

    def forward(self, images: Tensor, pairs: Pairs | None = None, last: bool = False) -> tuple[FeatureMap, ...]:
        """The maps; see :class:`Backbone`."""
        if self.only_shape not in (None, tuple(images.shape[-2:])):
            raise UserError(f"{self.name} was built for images of {self.only_shape} pixels and takes no others")
        embeddings = None
        if pairs is not None:
            images = images[torch.cat([rows for rows, _ in pairs])]
            embeddings = torch.cat([e_t.expand(len(rows), -1) for rows, e_t in pairs]).view(-1, *self._embedding_shape)
        with _adding(embeddings):
            maps = self._maps(images, self.read[-1:] if last else self.read)
        return tuple(FeatureMap(each.flatten(2).transpose(1, 2), (each.shape[2], each.shape[3])) for each in maps)

    def load(self, source: Source) -> LoadReport:
        """Fill it from ``source`` by timm's own conversion, positions resized.

        :class:`UserError`: parameters are missing or of another shape, a part that the model has holds others, values
        are quantised or not finite.
        """
        own, path = self.net.state_dict(), source.path
        tensors = self._converted(source)
        parts = {name.partition(".")[0] for name in own}
        missing = [name for name in own if name not in tensors]
        unused = [name for name in tensors if name not in own]
        foreign = [name for name in unused if name.partition(".")[0] in parts]
        wrong = [f"{name} is missing" for name in missing] + [f"{name} is not in this model" for name in foreign]
        for name in own.keys() & tensors.keys():
            theirs, ours = tuple(tensors[name].shape), tuple(own[name].shape)
            if theirs != ours:
                wrong.append(f"{name} is {theirs} there and {ours} in this model")
            elif own[name].is_floating_point() and not (is_float(tensors[name]) and tensors[name].isfinite().all()):
                wrong.append(f"{name} is quantised or not finite")
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(f"{path} does not fit {self.name}: {', '.join(wrong[:3])}{more}; choose its own --model")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        return LoadReport((), tuple(unused), "timm", self.normalisation)

    @property
    def normalisation(self) -> str:
        """The key of NORMALISATIONS of the model's own weights; "" where it is none of them."""
        declared = tuple(tuple(self.net.pretrained_cfg[key]) for key in ("mean", "std"))
        return next((name for name, known in NORMALISATIONS.items() if known == declared), "")

    def _converted(self, source: Source) -> Mapping[str, Tensor]:
        convert = getattr(sys.modules[type(self.net).__module__], "checkpoint_filter_fn", None)
        try:
            return convert(dict(source.raw), self.net) if convert else source.raw
        except Exception as error:  # it meets names and shapes of any kind
            reason = " ".join(str(error).split())
            raise UserError(f"{source.path} does not fit {self.name} ({reason}): choose its own --model") from None

    def _maps(self, images: Tensor, read: Sequence[int]) -> list[Tensor]:
        return self.net.forward_intermediates(images, indices=[*read], norm=True, intermediates_only=True)

    def _measure(self, stage: nn.Module, shape: tuple[int, int]) -> None:
        """Levels, and the shape of an embedding at the input of ``stage``, from a pass without values."""
        inputs: list[Tensor] = []
        handle = stage.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        self.net.eval()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            maps = self._maps(torch.zeros(1, 3, *shape), self.read)
        self.net.train()
        handle.remove()
        self.levels = tuple(Level(each.shape[1], shape[0] // each.shape[2]) for each in maps)
        x, known = inputs[0], getattr(self.net, "output_fmt", "NCHW")
        first = x.ndim == 4 and known != "NHWC" and x.shape[2] * shape[1] == x.shape[3] * shape[0]
        self.width = x.shape[1 if first else -1]
        self._embedding_shape = (self.width, 1, 1) if first else (*[1] * (x.ndim - 2), self.width)


@lru_cache
def width_of(name: str) -> int:
    """The channels of the last map of a model, which is not built."""
    with torch.device("meta"):
        return _timm().create_model(name.removeprefix(PREFIX)).feature_info[-1]["num_chs"]


def require_known(name: str) -> None:
    """UserError where timm cannot be imported or has no such model."""
    timm, short = _timm(), name.removeprefix(PREFIX).partition(".")[0]
    if not timm.is_model(short):
        close = difflib.get_close_matches(short, timm.list_models(), n=3, cutoff=0.3)
        raise UserError(f"timm has no model {short!r}: perhaps {', '.join(close)}")


def _create(name: str, shape: tuple[int, int]) -> tuple[Any, tuple[int, int] | None]:
    """(timm's model for images of ``shape``; that shape where it takes no other one)."""
    timm = _timm()
    require_known(name)
    short = name.removeprefix(PREFIX)
    for options in (*({"img_size": shape} | size for size in SIZES), {}):
        try:
            net = timm.create_model(short, **options)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            continue
        if not hasattr(net, "forward_intermediates"):
            raise UserError(f"{name} has no forward_intermediates, from which maps are read: choose another --model")
        return net, shape if [*options] == ["img_size"] else None
    raise UserError(f"{name} cannot be built for images of {shape[0]} x {shape[1]} pixels: choose another --model")


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError("--model timm:NAME needs timm: pip install 'fastmoe_lora[timm]'") from None
    except RuntimeError as error:  # that torchvision's operators do not exist
        reason = " ".join(str(error).split())
        raise UserError(
            f"timm cannot be imported ({reason}), since torchvision was built for another torch: install both from one "
            "index, for CPUs https://download.pytorch.org/whl/cpu"
        ) from None
    return timm


@contextmanager
def _adding(embeddings: Tensor | None) -> Iterator[None]:
    before = getattr(_PASS, "embeddings", None)
    _PASS.embeddings = embeddings
    try:
        yield
    finally:
        _PASS.embeddings = before


def _add_embeddings(stage: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    embeddings = getattr(_PASS, "embeddings", None)
    return None if embeddings is None else (args[0] + embeddings, *args[1:])
