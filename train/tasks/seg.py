"""Semantic segmentation. Label: uint8 (H, W), class ids of the data set, 255 void."""

from train.tasks.classes import ClassTask


class Segmentation(ClassTask):
    name, aliases = "seg", ("semseg",)
    folder = "semseg"
    weight = 1
