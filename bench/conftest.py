"""Timings need a machine that runs what is timed."""

import pytest
import torch


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    chosen = request.config.getoption("--kernel")
    if chosen == "triton" and not torch.cuda.is_available():
        pytest.skip("no GPU: the interpreter's time says nothing about the kernels; tests/kernels counts traffic")
    return chosen
