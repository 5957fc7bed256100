"""What tests of every part share: markers of cost, processes of their own, and real data from beside the repository."""

import os
import signal
import sys
from fnmatch import fnmatch
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"
# The marker of a file's tests by its place under tests/: the first pattern that fits, "" for the unit tier. A test that
# costs more than its file says is marked where it stands.
COSTS = {
    "kernels/*test_aot.py": "aot",
    "kernels/experts/test_crossover.py": "",
    "kernels/test_gpu.py": "gpu",
    "kernels/test_dispatch.py": "",
    "kernels/test_nvtx.py": "",
    "kernels/test_reference.py": "",
    "kernels/*": "interpret",
    "fastmoe_lora/test_compile.py": "slow",
    "fastmoe_lora/test_fused.py": "interpret",
    "fastmoe_lora/test_processes.py": "integration",
    "model/test_kernel_parity.py": "interpret",
    "model/decoders/test_kernel_parity.py": "interpret",
    "bench/test_counted.py": "interpret",
    "bench/test_gpu_script.py": "integration",
    "bench/test_tune.py": "integration",
    "train/run/*": "integration",
    "train/test_*": "integration",
    "test_docs.py": "integration",
    "test_slurm.py": "integration",
    "test_wheel.py": "integration",
}
TORCHVISION: list[object] = []  # operators exist as long as what defined them


def pytest_configure() -> None:
    """No test takes what another test, or a user, has kept. A shell starts what runs in its background to ignore
    interrupts, and children inherit that: then no test of an interrupt could pass."""
    os.environ["FASTMOE_LORA_CACHE"] = ""
    define_torchvision_operators()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def define_torchvision_operators() -> None:
    """Let PyPI's torchvision, which is built for CUDA, be imported beside a CPU build of torch: by timm, and by
    transformers where it is installed. Its import describes the shapes of two operators that do not exist then."""
    if sys.platform != "linux" or not find_spec("torchvision") or "+" in metadata.version("torchvision"):
        return  # of another index, and built for what its name says
    import torch

    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            TORCHVISION.append(torch.library.Library("torchvision", "FRAGMENT"))
            TORCHVISION[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def cost(path: Path) -> str:
    place = path.relative_to(TESTS).as_posix()
    return next((marker for pattern, marker in COSTS.items() if fnmatch(place, pattern)), "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(TESTS) and (marker := cost(item.path)):
            item.add_marker(marker)


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"real data is not here: {path}")
    return path


@pytest.fixture
def own_processes(monkeypatch):
    """Processes that a test starts can import the functions of its module, which pytest alone does not promise."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])


@pytest.fixture(scope="session")
def pascal_mini() -> Path:
    """A small real tree in the PASCAL_MT layout, partially labelled."""
    return _existing(SHARED / "data" / "pascal_mini")


@pytest.fixture(scope="session")
def vit_tiny_weights() -> Path:
    """ImageNet ViT-Ti/16 with timm's names, fp16."""
    return _existing(SHARED / "weights" / "vit_tiny_patch16_224.safetensors")
