"""Data sets for Hugging Face's datasets, and their upload to a hub on loopback."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pytest
from huggingface_hub import constants

from captioner.config import ExportConfig
from captioner.errors import ConfigError, JobError
from captioner.export import export_table
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, begin_table, caption_row, write_images
from tests.unit.export.conftest import CAPTIONS, NAMES, Export, files_of

TEXT_OF = {name: text for name, text in zip(NAMES, CAPTIONS, strict=True) if text}


def rows_of(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Return every row of a folder, read by datasets, images as bytes."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))
    return list(found.cast_column("image", datasets.Image(decode=False)))


@pytest.mark.filterwarnings("ignore")  # of datasets' own
@pytest.mark.parametrize("name", ["hf", "hf-folder"])
def test_datasets_reads_images_texts_and_columns(
    name: str, table: CaptionTable, export: Export, tmp_path: Path
) -> None:
    export(format=name, text="Look: {caption}", captions="all")
    add_part(table, [caption_row(3, "c.jpg", "late")])
    export(format=name, text="Look: {caption}", captions="all")
    found = rows_of(tmp_path / "out", tmp_path / "cache")
    assert {row["image_id"]: row["text"] for row in found} == {
        image_id: f"Look: {text}" for image_id, text in {**TEXT_OF, "c.jpg": "late"}.items()
    }
    assert next(row for row in found if row["key"] == 2)["captions"] == ["Look: a cat", "Look: one cat"]
    for row in found:
        image = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        assert image == (tmp_path / "images" / row["image_id"]).read_bytes()


def test_texts_alone_are_a_data_set_too(export: Export, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    export(format="hf", images=False, columns=("image_id",))
    found = pq.read_table(tmp_path / "out" / "data" / "train-00000.parquet")
    assert found.column_names == ["text", "image_id"]
    assert dict(zip(found["image_id"].to_pylist(), found["text"].to_pylist(), strict=True)) == TEXT_OF


def test_a_line_of_text_alone_is_json(tmp_path: Path) -> None:
    table, _ = begin_table(str(tmp_path / "table"), str(write_images(tmp_path / "few", 1)))
    add_part(table, [caption_row(0, "000.jpg", "one", text="mine")], [pa.field("text", pa.string())])
    config = ExportConfig(table=str(table.location), output=str(tmp_path / "out"), format="hf-folder", images=False)
    export_table(replace(config, columns=("text",)))
    [line] = (tmp_path / "out" / "train" / "00000" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(line) == {"text": "one"}


@pytest.mark.filterwarnings("ignore")  # of datasets' own
def test_a_date_is_one_in_datasets_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kept = [pa.field("taken", pa.date32())]
    table, _ = begin_table(str(tmp_path / "dated"), str(write_images(tmp_path / "few", 1)))
    add_part(table, [caption_row(0, "000.jpg", "one", taken=date(2024, 5, 6))], kept)
    config = ExportConfig(table=str(table.location), output=str(tmp_path / "out"), format="hf", images=False)
    export_table(config)
    found = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["taken"] for row in found] == [date(2024, 5, 6)]


def test_a_map_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    kept = [pa.field("tags", pa.map_(pa.string(), pa.int64()))]
    table, _ = begin_table(str(tmp_path / "mapped"), str(write_images(tmp_path / "few", 1)))
    add_part(table, [caption_row(0, "000.jpg", "one", tags=[("a", 1)])], kept)
    config = ExportConfig(table=str(table.location), output=str(tmp_path / "out"), format="hf", images=False)
    with pytest.raises(ConfigError, match=r"column tags is a MAP\(VARCHAR, BIGINT\), and datasets has no maps"):
        export_table(config)
    assert not (tmp_path / "out").exists()
    assert export_table(replace(config, format="hf-folder"))["rows"] == 1


# The hub

URL = "https://huggingface.co/datasets"


class Hub(BaseHTTPRequestHandler):
    """Takes commits of data sets as huggingface.co does."""

    repos: dict[str, dict[str, bytes]]
    commits: int
    refuses: int
    breaks_at: int

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.refuses:
            self.answer(self.refuses, {"error": "no"})
        elif parts == ["api", "repos", "create"]:
            made = json.loads(body)
            name = "/".join(filter(None, [made.get("organization"), made["name"]]))
            assert made["type"] == "dataset"
            assert "private" in (made.get("visibility"), *made)  # as a newer and an older client say it
            taken = name in self.repos
            self.repos.setdefault(name, {})
            self.answer(409 if taken else 200, {"url": f"{URL}/{name}", "id": name, "name": name})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer(200, {"files": modes})
        else:
            Hub.commits += 1
            if Hub.commits == self.breaks_at:
                self.answer(400, {"error": "broken"})
                return
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repos["/".join(parts[2:4])][line["value"]["path"]] = content
            self.answer(200, {"commitUrl": f"{URL}/org/captions/commit/1", "commitOid": "1" * 40})

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.refuses:
            self.answer(self.refuses, {"error": "no"})
            return
        files = self.repos["/".join(parts[2:4])]
        self.answer(200, [{"type": "file", "path": path, "size": len(files[path]), "oid": "1" * 40} for path in files])

    def answer(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.repos, Hub.commits, Hub.refuses, Hub.breaks_at = {}, 0, 0, 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{http.server_port}")
        yield Hub
        http.shutdown()


def test_a_hub_gets_what_out_holds_and_then_what_is_new(
    hub: type[Hub], table: CaptionTable, export: Export, tmp_path: Path
) -> None:
    assert export(format="hf", push_to_hub="org/captions")["pushed_files"] == 1
    assert export(format="hf", push_to_hub="org/captions")["pushed_files"] == 0
    add_part(table, [caption_row(3, "c.jpg", "late")])
    assert export(format="hf", push_to_hub="org/captions")["pushed_files"] == 1
    assert hub.repos == {"org/captions": files_of(tmp_path / "out")}


def test_an_upload_that_broke_off_continues(
    hub: type[Hub], export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captioner.export.hub._FILES_A_COMMIT", 2)
    hub.breaks_at = 2
    with pytest.raises(JobError, match="could not be uploaded"):
        export(format="hf-folder", push_to_hub="org/captions")
    assert len(hub.repos["org/captions"]) == 2
    assert export(format="hf-folder", push_to_hub="org/captions")["pushed_files"] == 3
    assert hub.repos == {"org/captions": files_of(tmp_path / "out")}


def test_a_hub_that_refuses_or_is_away_is_named(
    hub: type[Hub], export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses = 403
    with pytest.raises(ConfigError, match=r"the hub refuses to write org/captions \(HTTP 403\); set HF_TOKEN"):
        export(format="hf", push_to_hub="org/captions")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(JobError, match="the hub cannot be reached for org/captions"):
        export(format="hf", push_to_hub="org/captions")
    with pytest.raises(ConfigError, match=r"--push-to-hub is org/captions; expected --format with it: one of hf"):
        export(format="csv", push_to_hub="org/captions")
