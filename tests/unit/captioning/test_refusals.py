"""What a caption job refuses, or warns of, that no flag shows alone. Each message by its text."""

import re
from collections.abc import Mapping
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from captioner.captioning.job import DEMO_MODEL, resolve
from captioner.captioning.plan import plan_job
from captioner.captioning.refusals import check_device, warnings
from captioner.config import CaptionJobConfig, ImageConfig, InputConfig, ModelConfig
from captioner.errors import ConfigError, InputError, OutputError
from captioner.inputs import Fetcher
from captioner.machine import may_have_gpu
from tests.caption_tables import begin_table
from tests.http_server import PlainFolder, serving
from tests.sample_images import encoded


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded())
    return folder


def config(images: Path | str, output: Path | str, **changes: Any) -> CaptionJobConfig:
    flags = {"model": ModelConfig(model="demo"), "dry_run": True} | changes
    return CaptionJobConfig(input_path=str(images), output=str(output), **flags)


def refuses(error: type[Exception], text: str, job: CaptionJobConfig) -> None:
    with pytest.raises(error, match=re.escape(text)):
        plan_job(job)


def test_an_output_that_is_the_input_or_lies_in_it_is_refused(photos: Path, tmp_path: Path) -> None:
    refuses(OutputError, f"OUTPUT {photos} is INPUT; expected a folder of its own", config(photos, photos))
    inside = photos / "captions"
    text = f"OUTPUT {inside} lies in INPUT {photos}, which --refresh would list with it; expected a folder outside"
    refuses(OutputError, text, config(photos, inside))
    (tmp_path / "link").symlink_to(photos)
    refuses(OutputError, "lies in INPUT", config(photos, tmp_path / "link" / "captions"))
    assert plan_job(config(photos, tmp_path / "photos-captions")).num_left == 1


def test_an_output_with_files_of_something_else_is_refused(photos: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "letters").mkdir(parents=True)
    (home / "taxes.pdf").touch()
    text = (
        f"OUTPUT {home} holds 2 files or folders of something else, such as letters; expected a new or empty folder, or"
        f" the OUTPUT of an earlier run, such as {home}/captions"
    )
    refuses(OutputError, text, config(photos, home))
    for name in ("taxes.pdf", "letters"):
        (home / name).unlink() if name.endswith("pdf") else (home / name).rmdir()
    (home / ".DS_Store").touch()
    (home / "_run").mkdir()
    assert plan_job(config(photos, home)).num_left == 1


def test_a_table_with_a_file_beside_it_is_continued(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan_job(config(photos, out, dry_run=False))
    (out / "notes.txt").touch()
    assert plan_job(config(photos, out)).num_left == 1


def test_input_and_output_that_were_swapped_are_told(photos: Path, tmp_path: Path) -> None:
    swapped = "INPUT comes first, then OUTPUT: were they swapped?"
    refuses(OutputError, swapped, config(tmp_path / "out", photos))
    begin_table(str(tmp_path / "table"), str(photos))
    refuses(InputError, swapped, config(tmp_path / "table", photos))


def test_a_caption_table_as_input_is_refused_with_the_command_that_reads_it(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    begin_table(str(table), str(photos))
    for images in (table, table / "captions"):
        text = (
            f"INPUT {images} is a caption table, or part of one; expected images. To look into it: captioner query"
            f" {table}"
        )
        refuses(InputError, text, config(images, tmp_path / "out"))


def test_a_device_that_is_not_there_is_refused_before_the_job_and_in_a_dry_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    text = "--device is cuda, but this machine has no GPU, or CUDA_VISIBLE_DEVICES hides it; expected auto or cpu"
    for dry_run in (True, False):
        asked = config(photos, tmp_path / "out", model=ModelConfig(model="demo", device="cuda"), dry_run=dry_run)
        refuses(ConfigError, text, asked)
    check_device("cuda:1", {"CUDA_VISIBLE_DEVICES": "", "RAY_ADDRESS": "head:6379"})  # the cluster may have one


def test_a_gpu_is_looked_for_without_torch(tmp_path: Path) -> None:
    assert not may_have_gpu({}, tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not may_have_gpu({}, tmp_path), "a driver without a card"
    (tmp_path / "nvidia0").touch()
    assert may_have_gpu({}, tmp_path)
    assert not may_have_gpu({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path)


@pytest.mark.parametrize("options", [{"headers": {"a": "b"}}, {"client_kwargs": {"auth": "x"}}])
def test_a_login_for_all_servers_of_a_list_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    uris = tmp_path / "uris.txt"
    uris.write_text("http://example.com/a.jpg\n")
    name = "auth" if "client_kwargs" in options else "headers"
    text = f"--storage-options has {name}, which would go to every server that {uris} names; expected none with a local"
    asked = config(uris, tmp_path / "out", input=InputConfig(storage_options=options))
    refuses(ConfigError, text, asked)


PROXY = {"http_proxy": "http://proxy:3128"}


@pytest.mark.parametrize(
    ("images", "kind", "options", "environment", "is_told"),
    [
        ("uris.txt", "list", {}, PROXY, True),
        ("http://example.com/a/", "files", {}, {"HTTPS_PROXY": "http://proxy:3128"}, True),
        ("photos", "files", {}, PROXY, False),
        ("uris.txt", "list", {"client_kwargs": {"trust_env": True}}, PROXY, False),
        ("uris.txt", "list", {"proxy": "http://proxy:3128"}, PROXY, False),
        ("uris.txt", "list", {}, {}, False),
    ],
)
def test_a_proxy_that_is_not_used_is_told(
    images: str, kind: str, options: dict[str, Any], environment: Mapping[str, str], is_told: bool
) -> None:
    asked = config(images, "out", model=ModelConfig(model="m"), input=InputConfig(storage_options=options))
    text = """is set and not used for images: --storage-options '{"client_kwargs": {"trust_env": true}}' uses it"""
    told = list(warnings(resolve(asked), kind, environment))
    assert [line.partition(" ")[2] for line in told] == [text] * is_told


def test_the_demo_model_of_other_images_is_warned_of(photos: Path, tmp_path: Path) -> None:
    asked = config(photos, tmp_path / "out")
    assert DEMO_MODEL in list(warnings(resolve(asked), "files", {}))
    assert not list(warnings(resolve(replace(asked, input_path="demo")), "files", {}))


class _Proxy(PlainFolder):
    """Answers any request for a whole URL with an image, as a proxy does."""

    def do_GET(self) -> None:  # noqa: N802 - its name in http.server
        assert self.path == "http://images.example/a.jpg"
        data = encoded()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.parametrize("way", ["trust_env", "proxy"])
def test_the_option_that_the_warning_names_uses_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("http_proxy", url)
    web: dict[str, Any] = {"client_kwargs": {"trust_env": True}} if way == "trust_env" else {"proxy": url}
    s3 = {"key": "k", "secret": "s"}  # for the list's other images; no web server is given it
    fetcher = Fetcher(str(tmp_path / "uris.txt"), InputConfig(storage_options={**s3, **web}), ImageConfig())
    with serving(server):
        assert fetcher.fetch(["http://images.example/a.jpg"]) == [encoded()]
