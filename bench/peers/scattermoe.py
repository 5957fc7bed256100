"""ScatterMoE: sorts indices instead of tokens; its GEMMs gather on loading and scatter on storing."""

from torch import Tensor

from bench.peers.base import Forward, Layer, Peer, base_of, config_of, experts_of, select


def scattermoe(layer: Layer) -> Forward:
    def forward(x: Tensor) -> Tensor:
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

        active, weights = select(layer, x)
        a, b = experts_of(layer, x.dtype)
        sorting = flatten_sort_count(active, num_experts=config_of(layer).experts)
        hidden = parallel_linear(x, a.transpose(1, 2), active.shape[1], *sorting, grouped_out=True)
        gates = weights.to(x.dtype)
        output = parallel_linear(hidden, b.transpose(1, 2), 1, *sorting, gates=gates, grouped_in=True)
        return base_of(layer)(x) + output

    return forward


PEERS = (
    Peer(
        "scattermoe",
        scattermoe,
        package="scattermoe",
        install="pip install git+https://github.com/shawntan/scattermoe",
        gpu=True,
    ),
)
