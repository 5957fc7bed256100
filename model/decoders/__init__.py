"""Decoders of experts on a frozen encoder."""

from model.decoders.base import Decoder, Features, Frame
from model.decoders.config import FGConfig, MLoREConfig
from model.decoders.encoder_decoder import EncoderDecoder
from model.decoders.fgmoe import FGMoE, Plain
from model.decoders.mlore import MLoRE

__all__ = ["Decoder", "EncoderDecoder", "FGConfig", "FGMoE", "Features", "Frame", "MLoRE", "MLoREConfig", "Plain"]
