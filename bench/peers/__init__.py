"""Peers: other implementations of LoRA experts on a frozen FFN, most of which compute exactly the layer's function.

A peer whose package is not installed is ``absent``, and reports name it.
"""

from bench.peers import baselines, grouped, lorafusion, scattermoe
from bench.peers.base import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (*baselines.PEERS, *grouped.PEERS, *scattermoe.PEERS, *lorafusion.PEERS)
}
