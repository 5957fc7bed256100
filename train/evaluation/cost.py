"""What one image costs a model: floating-point operations and time."""

import time
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import MultiTaskModel

WARM_UP, PASSES = 3, 10


def photo(model: MultiTaskModel, shape: tuple[int, int]) -> Tensor:
    """One grey image (1, 3, height, width) on the model's device."""
    return torch.full((1, 3, *shape), 128.0, device=model.device)


def count_flops(model: MultiTaskModel, shape: tuple[int, int]) -> int:
    """Of products alone, as torch counts them: linear layers, attention, convolutions. A multiplication and its
    addition are two. ``model`` computes with the reference, since torch sees nothing of what a Triton kernel does.
    Attention is that of plain products, since torch does not count the CPU's fused one. Gradients stay enabled: the
    counter's hooks fail without them where a parameter is a module's input, as task embeddings are."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(photo(model, shape))
    return counter.get_total_flops()


@torch.inference_mode()
def measure_latency(model: MultiTaskModel, shape: tuple[int, int]) -> float:
    """Milliseconds of one image through the model: the median of PASSES, after WARM_UP others."""
    image, times = photo(model, shape), []
    for _ in range(WARM_UP + PASSES):
        start = time.perf_counter()
        model(image)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(1000 * (time.perf_counter() - start))
    return median(times[WARM_UP:])


def name_of(device: torch.device) -> str:
    """The GPU's name, or how many threads of the CPU compute."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
