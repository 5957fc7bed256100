"""FLOPs are those of the formula; a latency is a median of passes that are over."""

import torch
from torch import nn

from model import VITS, MultiTaskViT, ViT
from model.backbone import FeatureMap
from train.evaluation.cost import PASSES, WARM_UP, count_flops, measure_latency


def test_flops_are_two_for_each_multiplication_of_linear_layers_attention_and_convolutions():
    config = VITS["vit_micro"]
    model = MultiTaskViT(ViT(config, 64), {"seg": 3}, "light", None).eval()
    rows = 64 // config.patch
    n, d = rows**2 + 1, config.width
    block = n * d * (3 * d + d + 2 * 4 * d) + 2 * n * n * d  # qkv, proj and the FFN; q k^T and its product with v
    multiplications = rows**2 * d * 3 * config.patch**2 + config.depth * block
    counted = count_flops(model, (64, 64)) - count_flops_of_head(model, torch.zeros(1, n, d), rows)
    assert counted == 2 * multiplications


def count_flops_of_head(model, tokens, rows):
    class Head(nn.Module):
        device = torch.device("cpu")

        def forward(self, _):
            return model.heads["seg"]((FeatureMap(tokens, (rows, rows)),))

    return count_flops(Head(), (64, 64))


def test_latency_is_the_median_after_the_warm_up(monkeypatch):
    """In milliseconds: passes of 1, 2, 3, ... seconds."""
    seconds = iter(t for n in range(1, WARM_UP + PASSES + 1) for t in (0, n))
    monkeypatch.setattr("train.evaluation.cost.time.perf_counter", lambda: next(seconds))

    class Model(nn.Module):
        device, calls = torch.device("cpu"), 0

        def forward(self, image):
            assert image.shape == (1, 3, 8, 16)
            self.calls += 1

    model = Model()
    assert measure_latency(model, (8, 16)) == 1000 * (WARM_UP + (1 + PASSES) / 2) and model.calls == WARM_UP + PASSES
