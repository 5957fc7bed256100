"""Every peer computes the layer's own function, and a wrong one would not be timed."""

import pytest
import torch
import triton

from bench import algorithms, layers
from bench.peers import PEERS
from bench.peers.base import Peer, base_of, config_of, experts_of, rows_of, select
from bench.peers.grouped import sorted_experts
from kernels import reference

CONFIGS = ["16/3/1/4", "32/6/2/2", "16/4/0/4"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shape(config):
    return layers.Shape(width=24, tokens=35, config=config, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_has_the_layer_s_outputs_and_gradients(name, config):
    peer = PEERS[name]
    if reason := peer.absent(DEVICE):
        pytest.skip(f"{name} {reason}")
    layers.check(peer, layers.Problem(shape(config)))


@pytest.mark.parametrize("config", CONFIGS)
def test_the_sorted_peers_logic_with_a_plain_product(config):
    def product(x, weights, ends):
        return torch.cat([run @ w for run, w in zip(x.tensor_split(ends.tolist()[:-1]), weights, strict=True)])

    layers.check(Peer("sorted", lambda layer: sorted_experts(product, layer)), layers.Problem(shape(config)))


@pytest.mark.parametrize("config", [*CONFIGS, "64/12/4/1"])
def test_selected_experts_and_gates_are_the_reference_s(config):
    problem = layers.Problem(shape(config))
    layer, x = problem.layer, problem.x[0]
    active, weights = select(layer, x)
    z = reference.router_logits(x, layer.routers, rows_of(layer, x))
    expected = reference.gates(z, config_of(layer).gating)
    torch.testing.assert_close(torch.zeros_like(expected).scatter(1, active, weights), expected)


def _no_gates(layer):
    a, b = experts_of(layer, torch.float32)
    return lambda x: base_of(layer)(x) + torch.einsum("td,nrd,nor->to", x, a, b)


def _no_router_gradient(layer):
    def forward(x):
        active, weights = select(layer, x)
        dense = torch.zeros(len(x), config_of(layer).experts, device=x.device).scatter(1, active, weights.detach())
        a, b = experts_of(layer, torch.float32)
        return base_of(layer)(x) + torch.einsum("td,nrd,nor,tn->to", x, a, b, dense)

    return forward


@pytest.mark.parametrize("build", [_no_gates, _no_router_gradient], ids=["output", "gradient"])
def test_a_wrong_peer_is_refused(build):
    with pytest.raises(AssertionError, match="wrong"):
        layers.check(Peer("wrong", build), layers.Problem(shape("16/3/1/4")))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="has a GPU")
@pytest.mark.parametrize("name", algorithms.subjects())
def test_every_algorithm_of_ours_has_the_layer_s_outputs_and_gradients(name):
    layers.check(algorithms.subjects()[name], layers.Problem(shape("16/3/1/4"), "triton"))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="has a GPU")
@pytest.mark.parametrize("config", ["16/3/1/4", "64/12/4/16"])
def test_the_sorted_algorithm_has_the_layer_s_outputs_and_gradients(config):
    layers.check(algorithms.GROUPED, layers.Problem(shape(config), "triton"))
