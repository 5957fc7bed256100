"""What else adapts a frozen FFN with LoRA experts: each peer computes the layer's own function in its own way.

A peer that must be installed and is not is ``absent``: reports name it, nothing is skipped in silence.
"""

from bench.peers import baselines, grouped, lorafusion, scattermoe
from bench.peers.base import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (*baselines.PEERS, *grouped.PEERS, *scattermoe.PEERS, *lorafusion.PEERS)
}
