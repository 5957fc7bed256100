"""Weights by name, from a server on this machine that speaks the Hub's protocol."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from fastmoe_lora.hub import download, is_repository
from kernels import UserError
from model import VITS, ViT, ViTConfig, read_weights

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c0ffee" + "0" * 34
CONFIG = ViTConfig(width=24, depth=1, heads=3, patch=4)
Repositories = dict[str, dict[str, bytes]]


def weights(config=CONFIG, size=16) -> bytes:
    torch.manual_seed(0)
    return save(ViT(config, size).state_dict())


def pickled() -> bytes:
    file = io.BytesIO()
    torch.save(ViT(CONFIG, 16).state_dict(), file)
    return file.getvalue()


def timm_config(mean, std) -> bytes:
    return json.dumps({"architecture": "vit", "pretrained_cfg": {"mean": mean, "std": std}}).encode()


class Hub(ThreadingHTTPServer):
    """Serves {repository: {file: content}}; ``requests`` are (method, path, Range). A GET of a file of more than
    ``cut`` bytes ends after them, without notice, the first time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: Repositories = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.requests.append((self.command, self.path, self.headers["Range"]))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repository, revision, name = found.groups() if found else ("", "", "")
        if repository == "meta/gated":
            return self.refuse(403, "GatedRepo")
        if repository not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if name not in self.server.repositories[repository]:
            return self.refuse(404, "EntryNotFound")
        content = self.server.repositories[repository][name]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers["Range"] else 0
        etag = hashlib.sha256(content).hexdigest()
        self.send_response(206 if start else 200)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "X-Linked-ETag": f'"{etag}"'}
        headers |= {"X-Linked-Size": len(content), "Content-Length": len(content) - start, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        if body and 0 < self.server.cut < len(content):
            content, self.server.cut = content[: self.server.cut], 0
        if body:
            self.wfile.write(content[start:])
        return None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its attempts
        yield server
        server.shutdown()


def refusal(repository) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(repository)
    assert "\n" not in str(caught.value) and repository.partition("@")[0] in str(caught.value)
    return str(caught.value)


def fetched(hub, name) -> int:
    return sum(method == "GET" and path.endswith(name) for method, path, _ in hub.requests)


def test_safetensors_come_before_pickles(hub):
    hub.repositories["timm/vit"] = {"pytorch_model.bin": b"", "model.safetensors": weights()}
    read = read_weights("timm/vit")
    assert read.path.name == "model.safetensors" and COMMIT in str(read.path)
    assert torch.equal(read.tensors["pos_embed"], read_weights(read.path).tensors["pos_embed"])
    assert fetched(hub, "pytorch_model.bin") == 0


def test_a_repository_with_pickles_only(hub):
    hub.repositories["timm/vit"] = {"pytorch_model.bin": pickled()}
    assert read_weights("timm/vit").path.name == "pytorch_model.bin"


def test_what_is_in_the_cache_is_not_loaded_again(hub):
    hub.repositories["timm/vit"] = {"model.safetensors": weights()}
    paths = {read_weights("timm/vit").path for _ in range(3)}
    assert len(paths) == 1 and fetched(hub, "model.safetensors") == 1


def test_a_revision_is_taken_from_the_cache_without_a_question(hub):
    hub.repositories["timm/vit"] = {"model.safetensors": weights(), "config.json": b"{}"}
    read_weights(f"timm/vit@{COMMIT}")
    hub.requests.clear()
    read_weights(f"timm/vit@{COMMIT}")
    assert hub.requests == []


def test_a_broken_connection_is_resumed_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # whole chunks are kept
    content = weights()
    hub.repositories["timm/vit"], hub.cut = {"model.safetensors": content}, 1000
    path, _ = download("timm/vit")
    assert path.read_bytes() == content
    ranges = [asked for method, name, asked in hub.requests if method == "GET" and name.endswith("safetensors")]
    assert ranges == [None, "bytes=1000-"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_offline_mode_takes_the_cache_and_asks_nobody(hub, monkeypatch, name):
    hub.repositories["timm/vit"] = {name: weights() if name.endswith("safetensors") else pickled()}
    path = read_weights("timm/vit").path
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_weights("timm/vit").path == path
    assert "HF_HUB_OFFLINE is set: unset it" in refusal("timm/other")
    assert hub.requests == []


def test_without_a_network_the_cache_is_taken(hub, monkeypatch):
    hub.repositories["timm/vit"] = {"model.safetensors": weights()}
    path = read_weights("timm/vit").path
    hub.shutdown()
    hub.server_close()
    assert read_weights("timm/vit").path == path
    assert f"{hub.url} cannot be reached: connect, or download the weights elsewhere" in refusal("timm/other")


def test_a_damaged_download_is_one_line(hub):
    hub.repositories["timm/vit"] = {"model.safetensors": b"not weights"}
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        read_weights("timm/vit")


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("timm/unknown", "timm/unknown is neither a local path nor a repository at http://127.0.0.1"),
        ("meta/gated", "accept its terms at http://127.0.0.1"),
        ("timm/vit@v9", "timm/vit has no revision v9"),
        ("timm/empty", "holds neither model.safetensors nor pytorch_model.bin"),
        ("timm/a--b", "timm/a--b could not be downloaded"),
    ],
)
def test_every_refusal_is_one_line_with_a_remedy(hub, repository, message):
    hub.repositories |= {"timm/vit": {"model.safetensors": weights()}, "timm/empty": {"README.md": b""}}
    assert message in refusal(repository)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refusal("timm/vit").endswith("pip install 'fastmoe_lora[hub]'")


@pytest.mark.parametrize(
    ("repository", "config", "family", "normalisation"),
    [
        ("timm/vit_tiny.augreg", None, "AugReg", "inception"),
        ("facebook/dino-vits16", None, "DINO", "imagenet"),
        ("facebook/deit-tiny", None, "DeiT", "imagenet"),
        ("facebook/dinov3-like-sat493m", ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)), "DINO", "satellite"),
        ("timm/vit_base.mae", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "AugReg", "imagenet"),
    ],
)
def test_the_normalisation_is_what_the_repository_declares_or_its_family_has(
    hub, repository, config, family, normalisation
):
    files = {"model.safetensors": weights()} | ({"config.json": timm_config(*config)} if config else {})
    hub.repositories[repository] = files
    read = read_weights(repository)
    assert (read.family, read.normalisation) == (family, normalisation)


def test_an_unknown_normalisation_is_refused(hub):
    clip = timm_config((0.481, 0.457, 0.408), (0.268, 0.261, 0.275))
    hub.repositories["timm/vit_clip"] = {"model.safetensors": weights(), "config.json": clip}
    with pytest.raises(UserError, match=r"config.json declares mean and std \(\(0.481, .*--set normalisation=NAME"):
        read_weights("timm/vit_clip")


def test_a_config_that_is_no_json_is_one_line(hub):
    hub.repositories["timm/vit"] = {"model.safetensors": weights(), "config.json": b"{"}
    with pytest.raises(UserError, match="config.json is not JSON"):
        read_weights("timm/vit")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_a_repository_is_read_as_by_its_name(tmp_path, name):
    """As `hf download --local-dir` and git clone leave it."""
    folder = tmp_path / "deit-tiny"
    folder.mkdir()
    (folder / name).write_bytes(weights() if name.endswith("safetensors") else pickled())
    assert (read_weights(folder).family, read_weights(folder).normalisation) == ("DeiT", "imagenet")
    (folder / "config.json").write_bytes(timm_config([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]))
    assert read_weights(folder).normalisation == "inception"
    assert {*read_weights(folder).tensors} == {*ViT(CONFIG, 16).state_dict()}


def test_a_folder_without_weights_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path} holds neither model.safetensors nor pytorch_model.bin: give"):
        read_weights(tmp_path)


@pytest.mark.parametrize("mean", ["imagenet", None, 0.5, [], [[0.5], 0.5, 0.5], {"r": 0.5}])
def test_a_config_that_makes_no_sense_is_one_line(tmp_path, mean):
    (tmp_path / "model.safetensors").write_bytes(weights())
    (tmp_path / "config.json").write_bytes(timm_config(mean, [0.5, 0.5, 0.5]))
    with pytest.raises(UserError, match="config.json declares mean and std .*--set normalisation=NAME"):
        read_weights(tmp_path)


def test_paths_and_files_are_no_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "scenes").mkdir(parents=True)
    assert is_repository("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k") and is_repository("timm/vit@v1.0")
    for path in ("runs/scenes", "runs/vit.safetensors", "/timm/vit", "./timm/vit", "../vit", "vit", "a/b/c", "a/b.npz"):
        assert not is_repository(path), path


@pytest.mark.slow
def test_a_run_takes_weights_by_name_online_and_then_offline(hub, tmp_path):
    """The command, with the Hub's own environment variables; the decoder needs its encoder again to be resumed."""
    hub.repositories["timm/micro"] = {"model.safetensors": weights(VITS["vit_micro"], 16)}
    argv = [
        "--model",
        "vit_micro",
        "--pretrained",
        "timm/micro",
        "--decoder",
        "plain",
        "--tasks",
        "seg",
        "--out",
        "run",
    ]
    argv += ["--set", "scenes=4", "--set", "val_scenes=2", "--batch-size", "2", "--image-size", "16", "--workers", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for offline, options in (("0", ["--steps", "1"]), ("1", ["--steps", "2", "--resume"])):
        done = subprocess.run(
            [sys.executable, "-m", "train", *argv, *options],
            env={**environment, "HF_HUB_OFFLINE": offline}, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert re.search(rf"weights +\S*/models--timm--micro/snapshots/{COMMIT}/model.safetensors: AugReg", done.stdout)
