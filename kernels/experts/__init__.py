"""Experts of any width, with an activation, biases and a set per task: pools beyond those of one register tile."""

from kernels.experts.dispatch import expert_mixture
from kernels.experts.reference import ACTIVATIONS, Experts

__all__ = ["ACTIVATIONS", "Experts", "expert_mixture"]
