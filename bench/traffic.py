"""How many bytes kernels and operators move and how many products they make, counted in Triton's interpreter.

The interpreter executes every load and store: each is counted by its unmasked lanes and attributed to the tensor it
falls into. A dispatch mode counts what PyTorch's own operators read and write meanwhile, so that work moved out of the
kernels would not look free. No clock is involved: the numbers are the same on any machine.

*Issued* bytes are all that the programs ask for; *distinct* bytes count each address once per launch, which is what
memory sees while repeats hit the L2. Token-sized tensors (first dimension T) are counted apart: parameters, routers,
offsets and fp32 partial sums do not grow with T, or are as small as the weights.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter


@dataclass
class Argument:
    """A tensor in a launch, with one flag for every byte of its storage in each direction."""

    name: str
    tensor: torch.Tensor
    start: int = 0
    seen: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        storage = self.tensor.untyped_storage()
        self.start = storage.data_ptr()
        self.seen = {direction: np.zeros(storage.nbytes(), bool) for direction in ("read", "written")}


@dataclass
class Traffic:
    """Bytes by (kernel or operator, tensor, "read" or "written"), of token-sized tensors and of all others."""

    tokens: int
    launches: Counter = field(default_factory=Counter)
    operators: Counter = field(default_factory=Counter)  # of PyTorch, those that move something
    everything: int = 0  # distinct bytes of all tensors
    grids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    issued: Counter = field(default_factory=Counter)
    distinct: Counter = field(default_factory=Counter)
    others: Counter = field(default_factory=Counter)
    widths: dict[tuple[str, str, str], int] = field(default_factory=dict)
    atomics: int = 0
    flops: int = 0

    def per_token(self, counted: Counter) -> float:
        return sum(counted.values()) / self.tokens

    def __str__(self) -> str:
        """For the message of a failed assertion."""
        lines = [
            f"{' '.join(key):50} {issued / self.tokens:8.1f} {self.distinct[key] / self.tokens:8.1f}"
            for key, issued in self.issued.items()
        ]
        lines += ["bytes in all, of what is not token-sized:"]
        lines += [f"{' '.join(key):50} {n:8}" for key, n in self.others.items()]
        return "\n".join(["bytes per token: issued, distinct", *lines])


class _Operators(TorchDispatchMode):
    """Counts the operators of PyTorch outside launches; inside one they belong to the interpreter, not to us."""

    def __init__(self, recorder: "_Recorder") -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastmoe_lora":  # look inside: run its body with this mode in force
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        if self.recorder.arguments is None and "empty" not in func.__name__:
            # ``out`` and what is copied over are written, not read.
            read = args[1:] if func is torch.ops.aten.copy_.default else args
            self.recorder.operator(func, [*read, *(v for k, v in kwargs.items() if k != "out")], result)
        return result


class _Recorder:
    def __init__(self, tokens: int) -> None:
        self.traffic = Traffic(tokens)
        self.arguments: list[Argument] | None = None  # of the launch in progress
        self.kernel = ""

    def operator(self, func: Any, args: Any, result: Any) -> None:
        """Inputs are read and outputs written, but a view moves nothing: its output lies in an input's storage."""
        inputs = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in inputs}
        fresh = [t for t in outputs if t.untyped_storage().data_ptr() not in storages]
        if not fresh and not func._schema.is_mutable:
            return
        self.traffic.operators[str(func)] += 1
        for direction, tensors in (("read", inputs), ("written", outputs)):
            for t in tensors:
                # A broadcast dimension (stride 0) is read once.
                extent = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
                moved = int(np.prod(extent, dtype=np.int64)) * t.element_size()
                self.add(str(func), "x".join(map(str, t.shape)), direction, t, moved, moved)

    @contextmanager
    def launch(self, kernel: str, grid: tuple[int, ...], named: dict) -> Iterator[None]:
        self.traffic.launches[kernel] += 1
        launches = self.traffic.launches[kernel]
        self.kernel = kernel if launches == 1 else f"{kernel} #{launches}"
        self.traffic.grids[self.kernel] = grid
        tensors = ((name, getattr(t, "base", t)) for name, t in named.items())  # of a tensor descriptor, its tensor
        self.arguments = [Argument(name, t) for name, t in tensors if isinstance(t, torch.Tensor)]
        yield
        for argument in self.arguments:
            for direction, seen in argument.seen.items():
                self.add(self.kernel, argument.name, direction, argument.tensor, 0, int(seen.sum()))
        self.arguments = None

    def add(self, where: str, name: str, direction: str, tensor: torch.Tensor, issued: int, distinct: int) -> None:
        key = where, name, direction
        if not issued and not distinct:
            return
        self.traffic.everything += distinct
        if tensor.dim() and tensor.shape[0] == self.traffic.tokens:
            self.traffic.issued[key] += issued
            self.traffic.distinct[key] += distinct
            self.traffic.widths[key] = tensor.shape[-1]
        else:
            self.traffic.others[key] += issued

    def access(self, pointers: Any, mask: Any, direction: str) -> None:
        at, size = pointers.data[mask.data], pointers.get_element_ty().primitive_bitwidth // 8
        if not at.size:
            return
        arguments = self.arguments or ()
        inside = [a for a in arguments if a.start <= at.min() and at.max() < a.start + len(a.seen[direction])]
        assert inside, f"{self.kernel} accesses memory that none of its arguments owns"
        argument = inside[0]
        for byte in range(size):
            argument.seen[direction][(at - np.uint64(argument.start)).astype(np.int64) + byte] = True
        self.add(self.kernel, argument.name, direction, argument.tensor, at.size * size, 0)


@contextmanager
def counting(tokens: int) -> Iterator[Traffic]:
    """Everything that Triton's interpreter and PyTorch do in here, as a :class:`Traffic`."""
    recorder, patch = _Recorder(tokens), pytest.MonkeyPatch()
    builder, run = interpreter.InterpreterBuilder, interpreter.InterpretedFunction.run
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def counted_run(self, *args, grid, warmup, **kwargs):
        with recorder.launch(self.fn.__name__, grid, dict(zip(self.arg_names, args, strict=False)) | kwargs):
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def counted_load(self, pointers, mask, *rest, **named):
        recorder.access(pointers, mask, "read")
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self, pointers, value, mask, *rest):
        recorder.access(pointers, mask, "written")
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self, a, b, *rest):
        recorder.traffic.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def counted_atomic(original):
        def atomic(self, *args):
            recorder.traffic.atomics += 1
            return original(self, *args)

        return atomic

    def uncounted(self, *args):
        raise NotImplementedError("gathers and scatters of tensor descriptors are not counted")

    patch.setattr(interpreter.InterpretedFunction, "run", counted_run)
    patch.setattr(builder, "create_masked_load", counted_load)
    patch.setattr(builder, "create_masked_store", counted_store)
    patch.setattr(builder, "create_dot", counted_dot)
    for name in dir(builder):
        if name.startswith("create_atomic"):
            patch.setattr(builder, name, counted_atomic(getattr(builder, name)))
        elif re.match("create_descriptor_(?!load$|store$)", name):  # these two are loads and stores of pointers
            patch.setattr(builder, name, uncounted)
    try:
        with _Operators(recorder):
            yield recorder.traffic
    finally:
        patch.undo()
