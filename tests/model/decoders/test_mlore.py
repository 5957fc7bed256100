"""MLoRE's decoder against its equations, and its folded form."""

import copy

import pytest
import torch
from torch.nn import functional as F

from model import MLoRE, MLoREConfig
from model.decoders.mlore import Block, LowRankConv


@pytest.fixture
def decoder(make):
    """As trained: the statistics of every BatchNorm differ from 0 and 1."""
    decoder = make("mlore")
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_(1, 0.2)
                module.bias.normal_()
            elif isinstance(module, LowRankConv):
                module.up_bias.normal_()
                module.down.bias.normal_()
    return decoder.eval()


def test_experts_are_pairs_of_convolutions():
    torch.manual_seed(0)
    ranks = (1, 2, 3)
    experts = LowRankConv(4, ranks).double()
    torch.nn.init.normal_(experts.up_bias)
    x, g = torch.randn(2, 4, 5, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for i, rows in enumerate(torch.arange(6).split(ranks)):
        hidden = F.conv2d(x, experts.down.weight[rows], experts.down.bias[rows], padding=1)
        expected += g[:, i, None, None, None] * F.conv2d(hidden, experts.up[:, rows, None, None], experts.up_bias[i])
    torch.testing.assert_close(experts(x, g), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_one_convolution_per_image_and_task_gives_the_same(decoder, features, dtype, close):
    decoder = decoder.to(dtype)
    features = type(features)(tuple(tap.to(dtype) for tap in features.maps), features.index)
    folded = copy.deepcopy(decoder)
    folded.fold()
    with torch.no_grad():
        whole, short = decoder(features), folded(features)
    for task, y in whole.items():
        assert (short[task] - y).norm() <= close * y.norm(), task


def test_folding_counts_one_3x3_convolution_per_block(decoder, features, monkeypatch):
    decoder.fold()
    sizes, conv2d = [], F.conv2d

    def counted(x, weight, *rest, **options):
        sizes.append(weight.shape[-1])
        return conv2d(x, weight, *rest, **options)

    monkeypatch.setattr(F, "conv2d", counted)
    decoder.levels[0][0](features.maps[0], "seg")
    assert sizes.count(3) == 1


def test_the_smallest_gates_are_zero_and_not_renormalised(decoder, features):
    block = decoder.levels[0][0]
    seen = []
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    _, probabilities = block(features.maps[0], "seg")
    smallest = probabilities.argmin(-1, keepdim=True)
    torch.testing.assert_close(seen[0], probabilities.scatter(-1, smallest, 0.0))
    assert (seen[0].sum(-1) < 1).all()


def test_noise_is_for_training_only(decoder, features):
    assert torch.equal(decoder(features)["seg"], decoder(features)["seg"])
    block = decoder.levels[0][0].train()
    _, one = block(features.maps[0], "seg")
    _, other = block(features.maps[0], "seg")
    assert not torch.equal(one, other)


def test_the_shared_convolution_does_not_train_what_is_before_it(frame):
    block = Block(MLoREConfig(8, (1, 2), 2, active=2), (3, 2), ("seg",))
    x = torch.randn(2, 8, 3, 2, requires_grad=True)
    with torch.no_grad():
        for parameter in [*block.experts.parameters(), *block.paths["seg"].lora.parameters()]:
            parameter.zero_()
    block(x, "seg")[0].square().sum().backward()
    assert x.grad.abs().max() == 0 and block.shared.weight.grad.abs().max() > 0


def test_balance_is_the_squared_variation_of_the_mean_probabilities(decoder, features):
    seen = {}
    for i, level in enumerate(decoder.levels):
        for j, block in enumerate(level):
            block.register_forward_hook(lambda _, __, out, key=(i, j): seen.setdefault(key, []).append(out[1]))
    decoder(features)
    expected = 0
    for each in seen.values():
        mean = torch.stack(each).mean((0, 1))
        expected = expected + mean.var() / mean.mean() ** 2
    torch.testing.assert_close(decoder.regularisers()["balance"], expected)


def test_another_image_size_is_read_on_the_grid_of_the_router(frame):
    decoder = MLoRE(frame, MLoREConfig(8, (1, 2), 2, active=2)).eval()
    features = tuple(torch.randn(1, 8, 5, 4) for _ in range(4))
    from model.decoders import Features

    assert decoder(Features(features, {"seg": torch.tensor([0])}))["seg"].shape == (1, 5, 20, 16)
