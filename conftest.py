"""``--kernel`` chooses the implementation that tests/ and bench/ run; without a GPU Triton is interpreted.

With ``-n`` the workers divide the cores among them, and so do the processes that tests start.
"""

import os

import pytest
import torch

from kernels import KERNELS

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    torch.set_num_threads(int(threads))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A worker gets neighbouring tests, so that few fixtures of a module or a session are made by more than one."""
    if config.getoption("numprocesses", None) and config.getoption("dist") == "no":
        config.option.dist = "worksteal"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernel", choices=KERNELS, default="auto", help="implementation of the experts (default: auto)")


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--kernel")
