"""The interface of a data set, and the function that opens one."""

import hashlib
import json
import typing
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.datasets.cityscapes.tree import CityscapesTree
from train.datasets.files import Access, TreeDataSet
from train.datasets.nyud.tree import NyudTree
from train.datasets.pascal.tree import PascalTree
from train.datasets.scenes.dataset import Scenes
from train.datasets.tree import Tree
from train.files.reading import reading
from train.protocols import Protocol, Rendered, Sample, build_protocol
from train.tasks import Classes, Shape

Key = tuple[int, int]  # (index, epoch)
TREES: tuple[type[Tree], ...] = (PascalTree, NyudTree, CityscapesTree)
CLASSES = {Scenes.name: Scenes.classes} | {kind.name: kind.classes for kind in TREES}


class DataSet(typing.Protocol):
    """One split: images and the labels they have.

    ``dataset[index, epoch]`` is a dict of NumPy arrays: "image", uint8 (H, W, 3) RGB, and one entry per *labelled* task
    with the conventions of :mod:`train.tasks`. Augmentation is a function of (seed, epoch, index) alone.
    """

    name: str
    protocol: Protocol
    classes: Classes
    boundary_distance: float  # within which odsF matches boundaries, a share of the diagonal
    skipped: tuple[str, ...]  # one line per image that was left out because of a fault
    groups: tuple[NDArray[np.int64], ...]
    """Each lists the indices of the images labelled for the same tasks; together they are a partition of
    ``range(len(dataset))``."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> Sample: ...

    @property
    def origin(self) -> str:
        """The folder and the layout of its files; "" for a data set without files."""
        ...

    @property
    def ids(self) -> tuple[str, ...]:
        """A name for each image."""
        ...

    @property
    def digests(self) -> tuple[dict[str, str], ...]:
        """Per image a digest of its photo and its label of each task, as they are stored; empty where images have no
        files and follow from their ids."""
        ...

    def with_label(self, task: str) -> list[str]:
        """The ids of the images that have a label of ``task``."""
        ...

    def labelled(self, task: str) -> list[str]:
        """The ids of the images that scores of ``task`` are reported over."""
        ...

    def photo_shape(self, index: int) -> Shape:
        """(height, width) of the photo as it is stored."""
        ...

    def boundary_maps(self) -> dict[str, Callable[[], NDArray]]:
        """{id: loader} of the images on which odsF is defined. A loader is a picklable function that returns the
        LabelMap (H, W), or the boundaries as a mask, at the photo's size."""
        ...


def fingerprint(dataset: DataSet) -> str:
    """A hash of the images' names, of which of them are labelled for the same tasks, and of what their files hold."""
    digest = hashlib.sha256(json.dumps([dataset.ids, dataset.digests], sort_keys=True).encode())
    for group in dataset.groups:
        digest.update(np.asarray([len(group), *group], np.int64).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """Which images to open and how to read them.

    ``root`` is the folder of a tree, or "" for rendered scenes. ``scenes`` is the number of rendered scenes per split.
    ``size`` is the height of the input; 0 means the protocol's default size. ``dataset`` is the name of the data set,
    which is known without its files; "" means the one of the protocol's published numbers.
    """

    root: str
    tasks: tuple[str, ...]
    protocol_name: str
    size: int
    seed: int = 0
    scenes: dict[str, int] = field(default_factory=dict)
    access: Access = Access()
    dataset: str = ""

    @property
    def rendered(self) -> bool:
        return not self.root

    @property
    def protocol(self) -> Protocol:
        return Rendered(self.size) if self.rendered else build_protocol(self.protocol_name, self.size)

    @property
    def dataset_name(self) -> str:
        return Scenes.name if self.rendered else self.dataset or self.protocol.dataset

    @property
    def classes(self) -> Classes:
        return CLASSES[self.dataset_name]


def open_dataset(source: Source, split: str, scoring: bool = False, only: Container[str] | None = None) -> DataSet:
    """A split of ``source``. With ``scoring``, labels have the resolution at which the protocol compares predictions
    with them. ``only`` keeps the images of a tree with these ids. UserError where anything is missing."""
    if source.rendered:
        length = source.scenes.get(split, 0)
        return Scenes(split, source.size, length, source.seed, source.tasks)
    protocol = source.protocol.for_scoring() if scoring else source.protocol
    tree = open_tree(source.root, source.access.val_images)
    if protocol.edges_at_input and "edge" in source.tasks and not tree.reader.label_maps:
        raise UserError(
            f"protocol {protocol.name} derives edges from label maps, which {tree.title} does not have: choose another "
            f"--protocol, such as {tree.protocol}, or --tasks without edge"
        )
    return TreeDataSet(tree, split, source.tasks, protocol, source.seed, source.access, only)


def open_tree(folder: str | Path, val_images: str = "") -> Tree:
    """The tree at ``folder`` or in its folder of a usual name, of any data set and in any layout.

    ``val_images`` divides its images without lists."""
    given = Path(folder)
    with reading(given):
        found = [(kind, root) for kind in TREES if (root := kind.locate(given))]
        problem = f"holds {_told_apart()}" if given.is_dir() else "is not a folder"
    if len(found) == 1:
        kind, root = found[0]
        return replace(kind.open(root), val_images=val_images)
    if found:
        raise UserError(f"{given} holds {' and '.join(str(root) for _, root in found)}: give one of them")
    *most, last = (name for kind in TREES for name in kind.folders)
    raise UserError(f"{given} {problem}: give the folder {', '.join(most)} or {last} of a data set, or its parent")


def kind_of(folder: str) -> type[Tree] | None:
    """The data set of a tree, which has its usual protocol; None where there is no tree."""
    kinds = [kind for kind in TREES if folder and kind.locate(Path(folder))]
    return kinds[0] if len(kinds) == 1 else None


def _told_apart() -> str:
    """What is missing in a folder that is no tree."""
    lacking = (f"no folder {' with '.join(kind.marks)} ({kind.title})" for kind in TREES)
    return " and ".join(lacking)
