"""Which servers a model leads to, and what they are told."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from captioner.captioning.job import resolve
from captioner.config import CaptionJobConfig, InputConfig, ModelConfig
from captioner.errors import BundleError
from captioner.model.bundle import describe, load, save_bundle
from captioner.model.projector import build_projector
from tests.http_server import RangedFolder, serving
from tests.unit.model.test_bundle_stores import LINEAR
from tests.unit.model.tiny_models import edit_json, save_clip, save_llama

HEADERS = {"headers": {"Authorization": "Bearer hush"}}


@contextmanager
def web(folder: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A web server of a folder, and the headers of each request that came."""
    seen: list[dict[str, str]] = []

    class Handler(RangedFolder):
        def parse_request(self) -> bool:
            is_fine = super().parse_request()
            seen.append(dict(self.headers))
            return is_fine

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    with serving(server):
        yield f"http://127.0.0.1:{server.server_port}", seen


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAPTIONER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bundle"
    save_clip(folder / "clip")
    save_llama(folder / "llama")
    save_bundle(folder, build_projector(LINEAR), LINEAR, clip="clip", llama="llama")
    return folder


def test_a_bundle_on_a_web_server_is_the_bundle_on_disk_and_its_server_gets_its_options(bundle: Path) -> None:
    with web(bundle.parent) as (url, seen):
        found = load(f"{url}/bundle", device="cpu", storage_options=HEADERS)
    assert found.fingerprint == describe(str(bundle)).fingerprint
    assert {headers.get("Authorization") for headers in seen} == {"Bearer hush"}
    assert {headers["User-Agent"].partition("/")[0] for headers in seen} == {"captioner"}, "the guarded session"


def test_a_part_on_another_server_is_not_asked_unless_that_is_allowed(bundle: Path) -> None:
    with web(bundle) as (url, seen):
        edit_json(bundle / "bundle.json", clip=f"{url}/clip")
        with pytest.raises(BundleError, match=rf"names {url}/clip, .* another server; .*--allow-remote"):
            describe(str(bundle))
        assert not seen
        assert describe(str(bundle), allow_remote_parts=True).clip == f"{url}/clip"
        assert seen


def test_a_bundle_on_a_web_server_neither_sends_its_credentials_elsewhere_nor_leads_inside(bundle: Path) -> None:
    with web(bundle) as (elsewhere, seen), web(bundle.parent) as (url, _):
        edit_json(bundle / "bundle.json", clip=f"{elsewhere}/clip")
        with pytest.raises(BundleError, match="another server"):
            describe(f"{url}/bundle", HEADERS)
        with pytest.raises(BundleError, match=r"loopback|nothing under this name"):
            describe(f"{url}/bundle", HEADERS, allow_remote_parts=True)
    assert not seen


@pytest.mark.parametrize(
    ("images", "output", "model", "is_shared"),
    [
        ("https://a.example/in/", "/out", "https://A.example:443/model", True),
        ("https://a.example/in/", "/out", "https://b.example/model", False),
        ("https://a.example/in/", "/out", "http://a.example/model", False),
        ("https://a.example/in/", "/out", "zip://::https://b.example/model.zip", False),
        ("s3://photos/in/", "/out", "s3://models/m", True),
        ("s3://photos/in/", "/out", "org/model", False),
        ("hdfs://nn1/in", "/out", "hdfs://nn2/model", False),
        ("abfs://c@one.dfs.core.windows.net/in", "/out", "abfs://c@two.dfs.core.windows.net/m", False),
        ("abfs://c@one.dfs.core.windows.net/in", "/out", "abfs://d@one.dfs.core.windows.net/m", True),
        ("/in", "/out", "https://b.example/model", True),
        ("/in", "s3://tables/out", "https://b.example/model", False),
        ("/in", "s3://tables/out", "s3://models/m", True),
    ],
)
def test_a_model_gets_the_options_of_the_images_on_their_server_alone(
    images: str, output: str, model: str, is_shared: bool
) -> None:
    asked = CaptionJobConfig(
        input_path=images,
        output=output,
        input=InputConfig(storage_options=HEADERS),
        model=ModelConfig(model=model),
    )
    assert resolve(asked).config.model.model_storage_options == (HEADERS if is_shared else {})


def test_options_of_a_model_are_its_own() -> None:
    asked = CaptionJobConfig(
        input_path="https://a.example/in/",
        output="/out",
        input=InputConfig(storage_options=HEADERS),
        model=ModelConfig(model="https://b.example/m", model_storage_options={"headers": {"X": "y"}}),
    )
    assert resolve(asked).config.model.model_storage_options == {"headers": {"X": "y"}}
