"""Pools beyond one register tile: experts of any number and width, with activation, biases and a set per task."""
