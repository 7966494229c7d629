"""Bundles that lie on a store: read in place for a description, copied to the local cache once for loading."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep

import fsspec
import pytest
import torch

from captioner.errors import BundleError
from captioner.model.bundle import describe, load, save_bundle
from captioner.model.folder import Folder, open_folder
from captioner.model.hub import MODEL_FILES
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.model.weights import read_weights
from captioner.storage.folder_copy import copy_folder
from tests.conftest import Bucket
from tests.http_server import serving
from tests.unit.model.tiny_models import CLIP_WIDTH, LLAMA_WIDTH, edit_json, save_clip, save_llama

LINEAR = ProjectorConfig(kind="linear", num_features=CLIP_WIDTH, width=LLAMA_WIDTH)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save_clip(folder / "clip")
    save_llama(folder / "llama")
    (folder / "clip/pytorch_model.bin").write_bytes(b"a pickle that nobody shall fetch")
    save_bundle(folder, build_projector(LINEAR), LINEAR, clip="clip", llama="llama")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAPTIONER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def memory(original: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    store.put(f"{original}/", "/bucket/bundle/", recursive=True)
    yield "memory://bucket/bundle"
    store.rm("/bucket", recursive=True)


@pytest.fixture
def url(s3: Bucket, original: Path) -> str:
    s3.fs.put(f"{original}/", f"{s3.name}/bundle/", recursive=True)
    return f"{s3.url}/bundle"


def test_a_bundle_on_s3_is_the_bundle_on_disk(s3: Bucket, url: str, original: Path, cache: Path):
    told, local = describe(url, s3.storage_options), describe(str(original))
    assert told.fingerprint == local.fingerprint
    assert not cache.exists(), "a description copies nothing"
    model = load(url, device="cpu", storage_options=s3.storage_options)
    assert model.fingerprint == local.fingerprint
    assert all(torch.equal(t, model.llama.state_dict()[n]) for n, t in load(str(original)).llama.state_dict().items())


def test_a_bundle_is_written_to_s3(s3: Bucket, url: str, original: Path):
    options, fitted = s3.storage_options, f"{s3.url}/fitted"
    clip, llama = str(original / "clip"), f"{url}/llama"
    told = save_bundle(fitted, build_projector(LINEAR), LINEAR, clip=clip, llama=llama, storage_options=options)
    assert describe(fitted, options) == told
    assert load(fitted, device="cpu", storage_options=options).fingerprint == told.fingerprint


def test_a_bundle_on_s3_can_carry_its_models(s3: Bucket, original: Path):
    clip, llama = str(original / "clip"), str(original / "llama")
    save = {"clip": clip, "llama": llama, "carries_models": True, "storage_options": s3.storage_options}
    told = save_bundle(f"{s3.url}/whole", build_projector(LINEAR), LINEAR, **save)
    assert (told.clip, told.llama) == (f"{s3.url}/whole/clip", f"{s3.url}/whole/llama")
    assert not [path for path in s3.fs.find(s3.name) if path.endswith(".bin")]
    assert load(f"{s3.url}/whole", device="cpu", storage_options=s3.storage_options).fingerprint == told.fingerprint


def test_a_url_without_a_model_is_refused_first(s3: Bucket):
    with pytest.raises(BundleError, match=rf"no model at {s3.url}/bundel: there is nothing under this name"):
        describe(f"{s3.url}/bundel", s3.storage_options)
    with pytest.raises(BundleError, match=r"cannot open nope://x: Protocol not known: nope"):
        describe("nope://x")


def test_missing_credentials_are_named(s3: Bucket, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BundleError, match=rf"cannot read {s3.url}/bundle: NoCredentialsError: Unable to locate"):
        describe(f"{s3.url}/bundle", {"endpoint_url": s3.endpoint})


def test_a_copy_is_made_once_and_holds_no_pickle(memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    first = open_folder(memory).on_disk()
    store = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(store, "cat_ranges", lambda *_, **__: pytest.fail("copied again"))
    assert open_folder(memory).on_disk().path == first.path
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [Path(first.path).name]
    assert not list(Path(first.path).rglob("*.bin"))


def test_a_changed_bundle_is_a_new_copy(memory: str):
    before = open_folder(memory).on_disk().path
    fsspec.filesystem("memory").pipe_file("/bucket/bundle/README.json", b"{}")
    assert open_folder(memory).on_disk().path != before


def test_an_interrupted_copy_continues_at_the_byte_where_it_stopped(
    memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    store = type(fsspec.filesystem("memory"))
    real, fetched = store.cat_ranges, []

    def cut(self: object, paths: list[str], starts: list[int], ends: list[int], **options: object) -> list[bytes]:
        if len(fetched) == 5:
            raise OSError("the line went dead")
        fetched.extend(zip(paths, starts, strict=True))
        return real(self, paths, starts, ends, **options)

    def copy() -> Path:
        source = open_folder(memory)
        return copy_folder(source.fs, source.path, source.name, MODEL_FILES, range_bytes=20_000, num_ranges=1)

    monkeypatch.setattr(store, "cat_ranges", cut)
    with pytest.raises(BundleError, match=r"cannot copy memory://bucket/bundle/\S+ to .*the line went dead"):
        copy()
    assert not [path for path in cache.iterdir() if path.is_dir() and path.suffix != ".partial"], (
        "nothing half is a copy"
    )

    again: list[tuple[str, int]] = []

    def watched(self: object, paths: list[str], starts: list[int], ends: list[int], **options: object) -> list[bytes]:
        again.extend(zip(paths, starts, strict=True))
        return real(self, paths, starts, ends, **options)

    monkeypatch.setattr(store, "cat_ranges", watched)
    folder = copy()
    assert max(start for _, start in again) > 0, "no file was large enough to be cut"
    assert set(again).isdisjoint(fetched)
    assert describe(str(folder)).fingerprint == describe(memory).fingerprint


def test_loaders_that_start_together_share_one_copy(memory: str, monkeypatch: pytest.MonkeyPatch):
    store = type(fsspec.filesystem("memory"))
    real, fetched = store.cat_ranges, []

    def slow(self: object, paths: list[str], starts: list[int], *args: object, **options: object) -> list[bytes]:
        fetched.extend(zip(paths, starts, strict=True))
        sleep(0.02)
        return real(self, paths, starts, *args, **options)

    monkeypatch.setattr(store, "cat_ranges", slow)
    with ThreadPoolExecutor(4) as threads:
        copies = set(threads.map(lambda _: open_folder(memory).on_disk().path, range(4)))
    assert len(copies) == 1
    assert len(fetched) == len(set(fetched)) > 0


def test_an_object_that_arrives_short_is_no_copy(memory: str, monkeypatch: pytest.MonkeyPatch):
    store = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(store, "cat_ranges", lambda self, paths, *_, **__: [b"short"] * len(paths))
    with pytest.raises(BundleError, match=r"arrived with 5 bytes; expected \d+"):
        open_folder(memory).on_disk()


@pytest.mark.parametrize("name", ["/x/x.json", "../x.json", "a/../../x.json", "./x.json"])
def test_a_name_that_leads_out_of_a_model_is_refused_and_nothing_is_written(s3: Bucket, url: str, name: str, cache):
    s3.fs.call_s3("put_object", Bucket=s3.name, Key=f"bundle/{name}", Body=b"{}")
    with pytest.raises(BundleError, match=rf"{url} lists the file '{re.escape(name)}', which as a path leaves"):
        open_folder(url, s3.storage_options).on_disk()
    assert not cache.exists()


@pytest.mark.parametrize("link", ["/x/x.json", "../x.json", "a/../../x.json"])
def test_a_link_that_leads_out_of_a_model_on_a_web_server_is_refused(link: str, cache):
    class Web(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            folder = f"http://127.0.0.1:{self.server.server_port}/bundle/"
            self.wfile.write(f'<a href="{folder}{link}">x</a> <a href="{folder}config.json">c</a>'.encode())

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    refused = pytest.raises(BundleError, match=r"lists the file .*expected files inside it")
    with serving(server := ThreadingHTTPServer(("127.0.0.1", 0), Web)), refused:
        open_folder(f"http://127.0.0.1:{server.server_port}/bundle").on_disk()
    assert not cache.exists()


@pytest.mark.parametrize("shard", ["../../llama/model.safetensors", "/etc/x.safetensors"])
def test_a_shard_outside_of_its_model_is_refused(tmp_path: Path, original: Path, shard: str):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(BundleError, match=r"index.json names the file .*; expected files inside the folder"):
        read_weights(Folder.local(tmp_path))


def test_a_bundle_on_a_store_can_name_a_model_on_disk(memory: str, original: Path, tmp_path: Path):
    content = tmp_path / "bundle.json"
    content.write_bytes((original / "bundle.json").read_bytes())
    edit_json(content, llama=str(original / "llama"))
    fsspec.filesystem("memory").pipe_file("/bucket/bundle/bundle.json", content.read_bytes())
    assert load(memory, device="cpu").fingerprint == describe(str(original)).fingerprint


def test_credentials_in_the_address_of_a_model_are_refused_unseen():
    with pytest.raises(BundleError, match=r"s3://\*\*\*@bucket/model holds credentials") as error:
        describe("s3://AKIA:s3cr3t@bucket/model")
    assert "s3cr3t" not in str(error.value)
