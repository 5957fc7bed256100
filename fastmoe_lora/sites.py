"""Finding layers by name: which modules of a model the patterns of ``where`` mean, and whether they can be adapted."""

import copy
import difflib
import inspect
import re
import weakref
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe_lora.layers import LoRALinear, LoRAMoE, plain_ffn
from fastmoe_lora.swap import FORWARD_ON_INSTANCE
from kernels import UserError
from kernels.lora_linear import columns_pay
from kernels.reference import frozen

Patterns = str | Sequence[str]
# The FFN of every block, the first pattern that a model has: timm's and our blocks.N.mlp and most of Hugging Face's,
# T5's, and the first linear layer where the FFN is no module: BERT's and Swin's, Whisper's, ConvNeXtV2's.
FFN = ("*.mlp", "*.DenseReluDense", "*.intermediate.dense", "*.fc1", "*.pwconv1")
# The linear layers of attention, by timm's names and by those of Hugging Face.
ATTENTION = (
    "*.attn.qkv", "*.attn.proj", "*.attention.?_proj", "*.self_attn.?_proj", "*.self_attn.out_proj",
    "*.attention.self.query", "*.attention.self.key", "*.attention.self.value", "*.attention.output.dense",
    "*.attention.query_key_value", "*.attention.dense", "*.SelfAttention.?",
)  # fmt: skip
# Names of an FFN's first linear layer, activation and second linear layer: timm's, and Hugging Face's two.
FFN_NAMES = (("fc1", "act", "fc2"), ("fc1", "activation_fn", "fc2"), ("up_proj", "act_fn", "down_proj"))


def plain_name(name: str) -> str:
    """A module's name without what torch.compile and DistributedDataParallel put before it."""
    return re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "") + ".").removesuffix(".")


def find_sites(
    model: nn.Module, where: Patterns | None, argument: str = "where", whole: bool = False
) -> dict[str, nn.Module]:
    """The modules of ``model`` whose names match a pattern, by name; a module inside another match is left out.

    Patterns are those of :mod:`fnmatch`: ``*`` also matches dots. None takes the first of FFN that matches.
    UserError, which names ``argument``, if a pattern matches nothing or, unless a module is wanted as a ``whole``, a
    match cannot be adapted.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    patterns = [where] if isinstance(where, str) else list(FFN if where is None else where)
    matched = {pattern: [name for name in modules if fnmatchcase(plain_name(name), pattern)] for pattern in patterns}
    if where is None:
        matched = dict([next(((p, names) for p, names in matched.items() if names), ("", []))])
        where = " or ".join(patterns)
    if not matched or not all(matched.values()):
        lost = [pattern for pattern, names in matched.items() if pattern and not names]
        names = ", ".join(_closest(modules, patterns)) or "none, the model has no linear layer"
        raise UserError(f"{argument}={lost[0] if lost else where!r} matches no module; the closest names are {names}")
    wanted = {name for names in matched.values() for name in names}
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():  # a module comes before those inside it
        if name in wanted and not any(name.startswith(f"{outer}.") for outer in found):
            twin = next((other for other in found if found[other] is module), None)
            if twin:
                raise UserError(f"{argument}={where!r}: {name} is {twin}, one module by two names: match one of them")
            if not whole and (obstacle := _obstacle(module) or _bypass(modules, model, name)):
                raise UserError(f"{argument}={where!r} matches {name}, a {type(module).__name__}{obstacle}")
            found[name] = module
    return found


def find_linears(model: nn.Module, where: Patterns | None, argument: str) -> dict[str, nn.Linear]:
    """As :func:`find_sites`, for patterns that may match linear layers only; None takes all the usual ones."""
    if where is None:
        names = [plain_name(name) for name, _ in model.named_modules()]
        usual = [pattern for pattern in ATTENTION if any(fnmatchcase(name, pattern) for name in names)]
        where = usual or ATTENTION[0]
    found: dict[str, nn.Linear] = {}
    for name, module in find_sites(model, where, argument).items():
        if not isinstance(module, nn.Linear):
            raise UserError(f"{argument}={where!r} matches {name}, a {type(module).__name__}: LoRA needs nn.Linear")
        found[name] = module
    return found


def _obstacle(module: nn.Module) -> str:
    """Why ``module`` cannot be adapted; empty if it can."""
    parts = list(module.modules())
    if "forward" in module.__dict__ and not _adapted(module):
        return f" that {FORWARD_ON_INSTANCE}, which would bypass the adapter: adapt the model first"
    if any(type(part).__name__ == "Conv1D" for part in parts):
        return ", made of Conv1D as GPT-2 is: only linear layers can be adapted"
    if any(parameter.ndim == 3 for parameter in module.parameters() if parameter.is_leaf) and not _adapted(module):
        return ", which is a mixture of experts already: adapt another layer"
    if any(isinstance(part, nn.ModuleList) and name == "experts" for name, part in module.named_children()):
        return ", which is a mixture of experts already: adapt another layer"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not linears(module):
        return ": match linear layers or FFNs alone"
    return ""


def _adapted(module: nn.Module) -> bool:
    return isinstance(module, (LoRALinear, LoRAMoE))


def _bypass(modules: dict[str, nn.Module], model: nn.Module, name: str) -> str:
    """Why the layer ``name`` never runs, since the module around it reads its weight; empty if it does run."""
    outer, _, own = name.rpartition(".")
    parent = type(modules[outer] if outer else model)
    if not isinstance(modules[name], nn.Linear) or issubclass(parent, nn.TransformerEncoderLayer):
        return ""  # that one's fast path is switched off
    if getattr(modules.get(outer, model), f"{own}_bias_separate", False):
        return ""  # of timm's EVA and BEiT, which read the weight only without this
    read = re.compile(rf"(?<!isinstance\()self\.{re.escape(own)}\.weight\b(?!\.(dtype|device|shape|size))")
    for kind in parent.__mro__:
        for method, function in vars(kind).items():
            if kind is nn.Module or not inspect.isfunction(function) or re.search("init|reset|load|save|tie", method):
                continue
            try:
                source = inspect.getsource(function)
            except (OSError, TypeError):
                continue
            if read.search(source):
                return f": {parent.__name__} reads its weight and never calls it, so that an adapter would not run"
    return ""


def site_shape(site: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer or an FFN. The output comes from the last linear layer that does not read the
    input: w2 of (w1, w2, w3)."""
    found = linears(site)
    later = [linear for linear in found if linear.in_features != found[0].in_features]
    return found[0].in_features, (later or found)[-1].out_features


def find_inner(module: nn.Module, experts: bool) -> tuple[str, ...] | None:
    """What the kernels may compute of ``module`` instead of calling it (:class:`fastmoe_lora.layers.Adapters`).

    That is a linear layer, with ``experts`` only one that is wider than its input, or an FFN with one of FFN_NAMES:
    linear, exact GELU, linear, and nothing else that has an effect.
    """
    if type(module) is nn.Linear:
        return () if not experts or columns_pay(module.in_features, module.out_features) else None
    children = {name: child for name, child in module._modules.items() if child is not None}
    names = next((names for names in FFN_NAMES if children.keys() >= set(names)), None)
    if names is None or not experts or any(parameter is not None for parameter in module._parameters.values()):
        return None
    if not plain_ffn(module, names, drops=False):
        return None
    return names if _computes_ffn(module, names) else None


_KNOWN: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _computes_ffn(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the class's forward pass is linear, GELU, linear: seen on random weights, once for each class."""
    kind = type(module)
    if kind not in _KNOWN:
        with torch.inference_mode(False), torch.no_grad():
            twin = copy.deepcopy(module).to("meta").to_empty(device="cpu").double().eval()
            chance = torch.Generator("cpu").manual_seed(0)
            for parameter in twin.parameters():
                parameter.normal_(generator=chance)
            pair: list[Any] = [twin.get_submodule(name) for name in (names[0], names[2])]
            weights = tuple((linear.weight, linear.bias) for linear in pair)
            x = torch.randn(2, 3, weights[0][0].shape[1], dtype=torch.float64, device="cpu", generator=chance)
            y = twin(x)
            _KNOWN[kind] = isinstance(y, Tensor) and torch.allclose(y, frozen(x, weights))
    return _KNOWN[kind]


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAMoE]:
    """The layers that :func:`fastmoe_lora.adapt` adapted, by name."""
    return {name: module for name, module in model.named_modules() if _adapted(module)}


def linears(module: nn.Module) -> list[nn.Linear]:
    """The linear layers in ``module``, or itself."""
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _closest(modules: dict[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    """Up to five names of modules with linear layers, ``*`` for their numbers, in the order of likeness."""
    named = {re.sub(r"\b\d+\b", "*", name): None for name, module in modules.items() if linears(module)}
    likeness = {
        name: max((difflib.SequenceMatcher(None, pattern, name).ratio() for pattern in patterns), default=0.0)
        for name in named
    }
    return sorted(named, key=lambda name: -likeness[name])[:5]
