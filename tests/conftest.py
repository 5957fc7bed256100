"""What tests of every part share: processes of their own, and real data that are not part of the repository."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"real data is not here: {path}")
    return path


@pytest.fixture
def own_processes(monkeypatch):
    """Processes that a test starts can import the functions of its module, which pytest alone does not promise."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])


@pytest.fixture(scope="session")
def pascal_mini() -> Path:
    """A small real tree in the PASCAL_MT layout, partially labelled."""
    return _existing(SHARED / "data" / "pascal_mini")


@pytest.fixture(scope="session")
def vit_tiny_weights() -> Path:
    """ImageNet ViT-Ti/16 with timm's names, fp16."""
    return _existing(SHARED / "weights" / "vit_tiny_patch16_224.safetensors")
