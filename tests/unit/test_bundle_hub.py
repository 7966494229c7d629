"""Hub ids against a hub on loopback; its address is read at import, so each command runs in a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from captioner.model.projector import ProjectorConfig, build_projector
from tests.unit.tiny_models import CLIP_WIDTH, LLAMA_WIDTH, edit_json, save_clip, save_llama

LINEAR = ProjectorConfig(kind="linear", num_features=CLIP_WIDTH, width=LLAMA_WIDTH)
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
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture
def bundle(root: Path, tmp_path: Path) -> Path:
    from captioner.model.bundle import save_bundle

    folder = tmp_path / "bundle"
    clip, llama = str(root / "org/clip"), str(root / "org/llama")
    save_bundle(folder, build_projector(LINEAR), LINEAR, clip=clip, llama=llama)
    edit_json(folder / "bundle.json", clip="org/clip", llama=f"org/llama@{COMMIT}")
    return folder


def run(call: str, model: str | Path, home: Path, endpoint: str, **env: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from captioner.model.bundle import describe, load\nprint({call}.fingerprint)"
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, env=os.environ | settings | env
    )


DESCRIBE, LOAD = "describe(sys.argv[1])", "load(sys.argv[1], device='cpu')"


def test_hub_models_are_described_in_place_then_downloaded_once_then_used_offline(
    bundle: Path, server: str, tmp_path: Path
):
    Hub.fetched.clear()
    told = run(DESCRIBE, bundle, tmp_path / "home", server)
    assert told.returncode == 0, told.stderr
    shards = [fetch for fetch in Hub.fetched if ".safetensors " in fetch]
    assert shards
    assert not [fetch for fetch in shards if fetch.endswith("whole")], "a description reads ranges of weights"

    loaded = run(LOAD, bundle, tmp_path / "home", server)
    assert loaded.stdout == told.stdout, loaded.stderr
    assert not [fetch for fetch in Hub.fetched if fetch.startswith("pytorch_model.bin")]

    Hub.fetched.clear()
    assert run(LOAD, bundle, tmp_path / "home", server).stdout == told.stdout
    assert not [fetch for fetch in Hub.fetched if ".safetensors" in fetch], "whole in the cache"
    offline = run(LOAD, bundle, tmp_path / "home", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline.stdout == told.stdout, offline.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/nothing", "no model at 'org/nothing': it is no local folder, and the hub has no such public model"),
        ("org/gated", "org/gated is gated: accept its licence at http"),
        ("org/clip@v9", "org/clip has no revision 'v9' on the hub"),
        ("org/clip", "org/clip is a clip model; expected a bundle or a checkpoint of LlavaForConditionalGeneration"),
    ],
)
def test_a_hub_id_that_cannot_be_had_says_why(server: str, tmp_path: Path, model: str, message: str):
    failed = run(DESCRIBE, model, tmp_path, server)
    assert f"BundleError: {message}" in failed.stderr


def test_without_a_network_the_remedy_is_named(tmp_path: Path):
    for env, why in (({}, "the hub cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        failed = run(DESCRIBE, "org/clip", tmp_path, "http://127.0.0.1:9", **env)
        assert f"not in the hub cache {tmp_path}/hub, and {why}; run `hf download org/clip`" in failed.stderr
