"""What arrived in an earlier run of a job."""

import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pytest

from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.witnesses import Witnesses
from captioner.config import CaptionJobConfig, ModelConfig
from captioner.errors import JobError
from captioner.inputs import Fetcher
from captioner.model.bundle import describe
from captioner.schema import Reject, RejectReason, row_key, source_schema
from tests.caption_tables import add_part, begin_table, caption_row
from tests.sample_images import encoded


def test_images_and_tars_with_captions_are_known_by_their_urls(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(encoded())
    table, _ = begin_table(str(tmp_path / "out"), str(images))
    add_part(table, [caption_row(0, "a.jpg", "a cat")])
    config = CaptionJobConfig(input_path=str(images), output=str(tmp_path / "out"), model=ModelConfig(model="demo"))
    assert Witnesses(config).earlier() == [str(images / "a.jpg")]
    assert Witnesses(config).path_of(0) is None

    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = len(encoded())
        tar.addfile(member, BytesIO(encoded()))
    table, _ = begin_table(str(tmp_path / "tars"), str(tmp_path / "s.tar"))
    add_part(table, [caption_row(0, "s.tar/a.jpg", "a cat")])
    tars = Witnesses(CaptionJobConfig(input_path=str(tmp_path / "s.tar"), output=str(tmp_path / "tars")))
    assert tars.earlier() == [tars.path_of(0)] == [str(tmp_path / "s.tar")]
    nothing = Witnesses(CaptionJobConfig(input_path=str(images), output=str(tmp_path / "none")))
    assert (nothing.earlier(), nothing.path_of(0)) == ([], None)


def test_a_rerun_whose_rows_are_all_refused_records_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier run captioned s3://bucket/0.jpg; all other objects may not be read."""
    (tmp_path / "list.txt").write_text("".join(f"s3://bucket/{number}.jpg\n" for number in range(300)))
    table, _ = begin_table(str(tmp_path / "out"), str(tmp_path / "list.txt"))
    config = CaptionJobConfig(input_path=str(tmp_path / "list.txt"), output=str(tmp_path / "out"))
    rows = pa.Table.from_pylist(
        [
            {"key": row_key(0, n), "image_id": f"{n}", "attempt": 1, "uri": f"s3://bucket/{n}.jpg"}
            for n in range(1, 300)
        ],
        source_schema(),
    )
    refused = Reject(RejectReason.FORBIDDEN, "HTTP 403, AccessDenied")
    monkeypatch.setattr(
        Fetcher, "stream_rows", lambda _, found: [[(index, refused) for index in range(found.num_rows)]]
    )
    monkeypatch.setattr(
        Fetcher, "fetch", lambda _, uris: [b"x" if uri == "s3://bucket/0.jpg" else refused for uri in uris]
    )
    preprocessing = describe("demo").preprocessing
    with pytest.raises(JobError, match="256 images in a row did not arrive"):
        DecodeWorker(config, preprocessing)(rows)
    add_part(table, [caption_row(0, "0", "a cat")])
    assert set(DecodeWorker(config, preprocessing)(rows)["reason"].to_pylist()) == {"forbidden"}
