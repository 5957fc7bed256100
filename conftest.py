"""``--kernel`` chooses the implementation that tests/ and bench/ run."""

import pytest

from kernels import KERNELS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernel", choices=KERNELS, default="auto", help="implementation of the experts (default: auto)")


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--kernel")
