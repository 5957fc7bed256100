"""The versions that results were made with."""

import platform
from importlib import metadata

import numpy as np
import torch


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the digits."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name in ("triton", "fastmoe_lora"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
