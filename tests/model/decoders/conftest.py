"""Small decoders with random weights, and the features they read."""

import pytest
import torch

from model import FGConfig, FGMoE, MLoRE, MLoREConfig, Plain
from model.decoders import Features, Frame

CHANNELS = {"seg": 5, "sal": 2, "edge": 1}
GRID = (3, 2)
SOME = {"seg": torch.tensor([0, 2]), "edge": torch.tensor([1, 2])}

MAKE = {
    "fgmoe": lambda frame: FGMoE(frame, FGConfig.parse("3/2/4/1"), kernel="reference"),
    "fgmoe, ase": lambda frame: FGMoE(frame, FGConfig.parse("3/2/4/1", "ase"), kernel="reference"),
    "plain": lambda frame: Plain(frame, FGConfig.parse("3/2/4/1")),
    "mlore": lambda frame: MLoRE(frame, MLoREConfig(8, (1, 2, 3, 4), 2, active=3)),
}


@pytest.fixture
def frame():
    return Frame(8, GRID, CHANNELS)


@pytest.fixture
def maps():
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 8, *GRID, dtype=torch.float64, generator=rng) for _ in range(4))


@pytest.fixture
def features(maps):
    """All three images for every task."""
    return Features(maps, dict.fromkeys(CHANNELS, torch.arange(3)))


@pytest.fixture
def make(frame):
    """A decoder by name, in fp64, whose routers tell experts apart."""

    def make(name):
        torch.manual_seed(1)
        decoder = MAKE[name](frame).double()
        with torch.no_grad():
            for key, parameter in decoder.named_parameters():
                if "router" in key or "global_bias" in key:
                    parameter.normal_(std=0.3)
                elif "offsets" in key:  # of a 3x3 convolution of 256 channels: offsets of about half a pixel
                    parameter.normal_(std=0.01)
        return decoder

    return make
