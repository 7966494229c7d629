"""Hub ids, against a hub on loopback."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants

from captioner.errors import BundleError
from captioner.model.bundle import describe, load, save_bundle
from captioner.model.folder import Folder
from captioner.model.language.table import read_language
from captioner.model.projector import ProjectorConfig, build_projector
from tests.unit.model.tiny_models import CLIP_WIDTH, LLAMA_WIDTH, edit_json, save_clip, save_llama

LINEAR = ProjectorConfig(kind="linear", num_features=CLIP_WIDTH, width=LLAMA_WIDTH)
NOWHERE = "http://127.0.0.1:9"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves folders `root/org/name` the way huggingface.co serves model repositories."""

    root: Path
    fetched: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.answer_api("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self.answer_file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.answer(404, b"")

    def answer_api(self, repo: str, rest: list[str]) -> None:
        if repo == "org/gated":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not (self.root / repo).is_dir():
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            folder = self.root / repo
            files = [path for path in sorted(folder.iterdir()) if path.is_file()]
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)} for f in files]
            self.answer(200, json.dumps(entries).encode())
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())

    def answer_file(self, repo: str, name: str) -> None:
        file = self.root / repo / name
        if not file.exists():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(file)}"'}
        if self.command == "GET":
            self.fetched.append(f"{name} {self.headers.get('Range', 'whole')}")
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            total = len(content)
            content = content[int(first) : int(last or total) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{total}"
            self.answer(206, content, headers)
        else:
            self.answer(200, content, headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    save_clip(root / "org/clip")
    save_llama(root / "org/llama", max_shard_size="60KB")
    (root / "org/llama/pytorch_model.bin").write_bytes(b"a pickle that nobody shall fetch")
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[str]:
    Hub.root, Hub.fetched = root, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(autouse=True)
def hub(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(server, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    Hub.fetched.clear()


def go_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does for a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def bundle(root: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    clip, llama = str(root / "org/clip"), str(root / "org/llama")
    save_bundle(folder, build_projector(LINEAR), LINEAR, clip=clip, llama=llama)
    edit_json(folder / "bundle.json", clip="org/clip", llama=f"org/llama@{COMMIT}")
    return folder


def fetched_weights() -> list[str]:
    return [fetch for fetch in Hub.fetched if ".safetensors " in fetch]


def test_a_description_reads_only_ranges_of_the_weights_on_the_hub(bundle: Path, root: Path):
    told = describe(str(bundle))
    assert told.llama_fingerprint == describe_llama(root / "org/llama")
    assert fetched_weights()
    assert not [fetch for fetch in fetched_weights() if fetch.endswith(" whole")]


def describe_llama(folder: Path) -> str:
    return read_language(Folder.local(folder), template="").fingerprint()


def test_loading_downloads_once_and_never_a_pickle(bundle: Path):
    told = describe(str(bundle))
    assert load(str(bundle), device="cpu").fingerprint == told.fingerprint
    assert [fetch for fetch in fetched_weights() if fetch.endswith(" whole")]
    assert not [fetch for fetch in Hub.fetched if "pytorch_model.bin" in fetch]
    Hub.fetched.clear()
    assert load(str(bundle), device="cpu").fingerprint == told.fingerprint
    assert not fetched_weights(), "whole in the cache"


def test_a_cached_model_needs_no_network(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    fingerprint = load(str(bundle), device="cpu").fingerprint
    go_to(NOWHERE, monkeypatch)
    assert describe(str(bundle)).fingerprint == fingerprint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(str(bundle), device="cpu").fingerprint == fingerprint


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/nothing", "no model at 'org/nothing': it is no local folder, and the hub has no such public model"),
        ("org/gated", "org/gated is gated: accept its licence at http"),
        ("org/clip@v9", "org/clip has no revision 'v9' on the hub"),
        ("org/clip", "org/clip is a clip model; expected a bundle or a checkpoint of LlavaForConditionalGeneration"),
    ],
)
def test_an_unavailable_hub_id_is_refused_with_the_cause(model: str, message: str):
    with pytest.raises(BundleError, match=re.escape(message)):
        describe(model)


@pytest.mark.parametrize(("offline", "why"), [(False, "the hub cannot be reached"), (True, "HF_HUB_OFFLINE is set")])
def test_without_a_network_the_remedy_is_named(
    offline: bool, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    go_to(NOWHERE, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(
        BundleError, match=rf"not in the hub cache {tmp_path}/hub, and {why}; run `hf download org/clip`"
    ):
        describe("org/clip")


def test_an_interrupted_download_is_not_a_model(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load(str(bundle), device="cpu")
    next((tmp_path / "hub/models--org--llama/snapshots" / COMMIT).glob("model-00002*")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BundleError, match=rf"org/llama@{COMMIT} is in the hub cache \S+ without all of its weights"):
        describe(str(bundle))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load(str(bundle), device="cpu")
