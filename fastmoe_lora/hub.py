"""The weights file of a repository of the Hugging Face Hub, by name (downloaded once and cached) or in a local copy."""

import json
import os
import re
from pathlib import Path
from typing import Any

from kernels import UserError

FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference
REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(@[\w./-]+)?")
LOCAL = re.compile(r"\.(safetensors|npz|pth|pt|bin)$")


def is_repository(source: str | Path) -> bool:
    """Whether ``source`` is ``owner/name`` or ``owner/name@revision``, and neither a local path nor named as a file."""
    text = str(source)
    return bool(REPOSITORY.fullmatch(text)) and not LOCAL.search(text) and not Path(text).exists()


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds a weights file of :data:`FILES`, as `hf download --local-dir` and git clone leave it."""
    return any((folder / name).is_file() for name in FILES)


def read_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """What :func:`download` returns, of such a folder; :class:`UserError` where there are no weights in it."""
    if not holds_weights(folder):
        raise UserError(f"{folder} holds neither {' nor '.join(FILES)}: give the path of a weights file")
    path = next(folder / name for name in FILES if (folder / name).is_file())
    config = folder / "config.json"
    return path, _read_config(config if config.is_file() else None)


def download(repository: str) -> tuple[Path, dict[str, Any]]:
    """(the weights file, the content of config.json or {}) of ``owner/name`` or ``owner/name@revision``.

    What is in the cache is not loaded again, and with ``HF_HUB_OFFLINE=1``, or without a network, it is taken from
    there. :class:`UserError` in one line: huggingface_hub is not installed, there is no such repository or revision,
    access is not granted, no weights are in it, or it cannot be reached and is not in the cache.
    """
    path = next((path for name in FILES if (path := fetch(repository, name))), None)
    if path is None:
        raise UserError(
            f"{repository} on the Hugging Face Hub holds neither {' nor '.join(FILES)}: download the file that you "
            "mean and give its path"
        )
    return path, _read_config(fetch(repository, "config.json"))


def _read_config(path: Path | None) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except ValueError:
        raise UserError(f"{path} is not JSON: delete it and download it again") from None
    return content if isinstance(content, dict) else {}


def fetch(repository: str, filename: str) -> Path | None:
    """The cached file; None where the repository, or without a network the cache, holds others only."""
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise UserError(
            f"no such path: {repository}; to download it from the Hugging Face Hub, pip install 'fastmoe_lora[hub]'"
        ) from None
    name, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(name, filename, revision=revision or None))
    except errors.LocalEntryNotFoundError:
        if _cached(name, revision):
            return None
        offline = "HF_HUB_OFFLINE is set" if _offline() else f"{_endpoint()} cannot be reached"
        remedy = "unset it" if _offline() else "connect"
        raise UserError(
            f"{repository} is neither a local path nor in the cache of the Hugging Face Hub, and {offline}: {remedy}, "
            "or download the weights elsewhere and give their path"
        ) from None
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError:
        raise UserError(
            f"access to {repository} is restricted: accept its terms at {_endpoint()}/{name}, then log in with "
            "'hf auth login'"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repository} is neither a local path nor a repository at {_endpoint()}: check the name; a private one "
            "needs 'hf auth login'"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision}: see {_endpoint()}/{name}/commits/main") from None
    except Exception as error:  # of its HTTP client, of the disk, of its checks of names
        raise UserError(
            f"{repository} could not be downloaded ({' '.join(str(error).split())[:200]}): try again, or download the "
            "weights elsewhere and give their path"
        ) from None


def _cached(name: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file, revision=revision or None), str) for file in FILES)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
