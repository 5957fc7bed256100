"""Shared by the benchmarks: the chosen implementation, and the description of the machine in results."""

import platform
from importlib import metadata

import pytest
import torch

from bench.peers import PEERS


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    chosen = request.config.getoption("--kernel")
    if chosen == "triton" and not torch.cuda.is_available():
        pytest.skip("no GPU: the interpreter's time says nothing about the kernels; tests/kernels counts traffic")
    return chosen


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Adds what bench.report prints around its tables, a summary and the peers that are not timed here, and removes the
    host's name."""
    machine_info.pop("node", None)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {name: _version(name) for name in ("torch", "triton")}
    machine_info["summary"] = {"gpu": gpu, "python": platform.python_version(), **versions}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["absent"] = {name: why for name, peer in PEERS.items() if (why := peer.absent(device))}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
