"""``--kernel`` chooses the implementation that tests/ and bench/ run; without a GPU Triton is interpreted."""

import os

import pytest
import torch

from kernels import KERNELS

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernel", choices=KERNELS, default="auto", help="implementation of the experts (default: auto)")


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--kernel")
