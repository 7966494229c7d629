"""The whole job on a real Ray: rows in = rows out, whatever the input holds and however often it is run."""

import json
import signal
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from captioner.caption_columns import Caption
from captioner.captioning.captioner import Captioner
from captioner.cluster.caption_pipeline import caption_images
from captioner.cluster.interrupts import StopRequest
from captioner.cluster.ray_private import drop_unread_tasks
from captioner.cluster.session import joined_cluster
from captioner.cluster.sources_and_sinks import ReadSlices
from captioner.config import (
    CaptionJobConfig,
    DecodingConfig,
    ImageConfig,
    InputConfig,
    ModelConfig,
    ResourceConfig,
    VerifyConfig,
)
from captioner.errors import JobError, OutputError
from captioner.inputs import Unit
from captioner.inputs.slices import Slice
from captioner.schema import CAPTIONS
from captioner.tables.verification import verify
from tests.conftest import Bucket
from tests.sample_images import BROKEN, encoded
from tests.unit.model.tiled_llavas import SIZES, photographs, save_llava_next

pytestmark = [
    pytest.mark.usefixtures("on_ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own sockets, when a driver leaves its cluster
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Data copies its own deprecated settings
]


def job(input_path: object, output: str, bundle: str, **input_options: Any) -> CaptionJobConfig:
    return CaptionJobConfig(
        input_path=str(input_path),
        output=output,
        input=InputConfig(**input_options),
        image=ImageConfig(max_image_pixels=50_000),
        model=ModelConfig(model=bundle),
        decoding=DecodingConfig(max_new_tokens=5),
        resources=ResourceConfig(rows_per_part=16),
    )


def captions(output: str) -> pd.DataFrame:
    return pd.read_parquet(f"{output}/captions").sort_values("key").reset_index(drop=True)


def folder_of_images(folder: Path, num_images: int = 20) -> Path:
    folder.mkdir()
    for seed in range(num_images):
        (folder / f"{seed:03d}.jpg").write_bytes(encoded(seed=seed))
    return folder


def with_broken(folder: Path) -> Path:
    for reason, data in BROKEN.items():
        (folder / f"broken-{reason}.jpg").write_bytes(data)
    return folder


@pytest.mark.slow
def test_a_captioner_in_tiles_captions_images_of_all_shapes_as_it_does_alone(tmp_path: Path) -> None:
    llava = save_llava_next(tmp_path / "llava")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(photographs()):
        image.save(tmp_path / "images" / f"{number:03d}.png")
    with_broken(tmp_path / "images")
    config = job(tmp_path / "images", str(tmp_path / "out"), str(llava))
    config = replace(
        config,
        image=ImageConfig(max_image_pixels=88_000),
        model=replace(config.model, device="cpu", dtype="float32"),
    )
    summary = caption_images(config)
    assert sums_of(summary) == (len(SIZES) + len(BROKEN), len(SIZES), len(BROKEN))
    with Captioner.from_bundle(config.model, config.decoding, slots="4") as captioner:
        expected = {f"{number:03d}.png": captioner.caption(image) for number, image in enumerate(photographs())}
    found = captions(str(tmp_path / "out"))
    for name, text, width, height in zip(found.image_id, found.caption, found.width, found.height, strict=True):
        outcome = expected[Path(name).name]
        assert isinstance(outcome, Caption)
        assert text == outcome.caption
        assert (width, height) == SIZES[int(Path(name).stem)]
    assert captioner.model.num_image_tokens == 16 + 8 * 9


def sums_of(summary: Mapping[str, Any]) -> tuple[int, int, int]:
    return summary["read"], summary["captioned"], summary["failed"]


@pytest.mark.slow
def test_a_rerun_reads_nothing_and_a_later_run_continues_where_a_limit_stopped(
    tmp_path: Path, output: str, bundle: str
) -> None:
    images = folder_of_images(tmp_path / "images")
    assert sums_of(caption_images(job(images, output, bundle, limit=7))) == (7, 7, 0)
    again = caption_images(job(images, output, bundle, limit=7))
    assert (again["read"], again["skipped_done"]) == (0, 7)
    rest = caption_images(job(images, output, bundle))
    assert (rest["read"], rest["skipped_done"]) == (13, 7)
    assert verify(VerifyConfig(table=output))["ok"]

    unbroken = str(tmp_path / "unbroken")
    caption_images(job(images, unbroken, bundle))
    pd.testing.assert_frame_equal(captions(output).drop(columns="run_id"), captions(unbroken).drop(columns="run_id"))


@pytest.mark.slow
def test_transient_failures_are_tried_again_and_counted(tmp_path: Path, output: str, bundle: str) -> None:
    images = folder_of_images(tmp_path / "images", num_images=3)
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join([*(str(path) for path in sorted(images.iterdir())), "http://127.0.0.1:9/refused.jpg"]))
    config = job(listing, output, bundle)
    first = caption_images(config)
    assert first["failed_by_reason"] == {"fetch_failed": 1}
    second = caption_images(config)
    assert (second["read"], second["failed"], second["skipped_done"]) == (1, 1, 3)
    attempts = pd.read_parquet(f"{output}/failures").sort_values("attempt")["attempt"].tolist()
    assert attempts == [1, 2]
    assert verify(VerifyConfig(table=output))["failed"] == 1


@pytest.mark.slow
def test_a_job_stops_once_more_images_failed_than_may_and_keeps_what_was_captioned(
    tmp_path: Path, output: str, bundle: str
) -> None:
    images = with_broken(folder_of_images(tmp_path / "images", num_images=32))
    config = job(images, output, bundle)
    limited = CaptionJobConfig(**{**vars(config), "max_failed_share": 0.1})
    with pytest.raises(JobError, match=r"4 of 36 images failed \(.*1 corrupt.*\); --max-failed-share is 0\.1"):
        caption_images(limited)
    assert set(pd.read_parquet(f"{output}/failures")["reason"]) == set(BROKEN)
    summary = caption_images(CaptionJobConfig(**{**vars(config), "max_failed_share": 0.2}))
    assert (summary["skipped_done"] + summary["captioned"], summary["failed"]) == (36, 0)
    assert verify(VerifyConfig(table=output))["ok"]


@pytest.mark.slow
def test_a_bucket_that_is_gone_ends_the_job_before_a_row_is_written(
    s3: Bucket, tmp_path: Path, output: str, bundle: str
) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(f"s3://gone-since/{n}.jpg" for n in range(256)))  # one call
    config = job(listing, output, bundle, storage_options=s3.storage_options)
    with pytest.raises(JobError, match=r"256 images in a row did not arrive.*s3://gone-since/.*fetch_failed"):
        caption_images(config)
    assert not list(Path(output).glob("*/part-*.parquet"))


@pytest.mark.slow
def test_another_decoding_into_the_same_output_is_refused(tmp_path: Path, output: str, bundle: str) -> None:
    images = folder_of_images(tmp_path / "images", num_images=2)
    caption_images(job(images, output, bundle))
    other = CaptionJobConfig(input_path=str(images), output=output, model=ModelConfig(model=bundle))
    with pytest.raises(OutputError, match=r"decoding\.max_new_tokens: 5 there, 64 now"):
        caption_images(other)


@pytest.mark.slow
def test_a_parquet_of_bytes_keeps_its_ids_and_columns(tmp_path: Path, output: str, bundle: str) -> None:
    table = pa.table(
        {
            "image": pa.array([{"bytes": encoded(seed=n), "path": f"{n}.jpg"} for n in range(5)] + [None]),
            "uid": [f"id-{n}" for n in range(6)],
            "label": pa.array(range(6), pa.int16()),
        }
    )
    pq.write_table(table, tmp_path / "images.parquet")
    config = job(tmp_path / "images.parquet", output, bundle, id_column="uid", keep_columns=("label=truth",))
    assert sums_of(caption_images(config)) == (6, 5, 1)
    found = captions(output)
    assert found["image_id"].tolist() == [f"id-{n}" for n in range(5)]
    assert found["truth"].tolist() == [0, 1, 2, 3, 4]
    assert found["truth"].dtype == "int16"
    assert pd.read_parquet(f"{output}/failures")["reason"].tolist() == ["empty"]


def tar_of_images(path: Path, num_images: int) -> None:
    with tarfile.open(path, "w") as tar:
        for seed in range(num_images):
            for ending, data in (("jpg", encoded(seed=seed)), ("json", json.dumps({"n": seed}).encode())):
                info = tarfile.TarInfo(f"{seed:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


@pytest.mark.slow
def test_tars_are_counted_while_they_are_read_so_that_a_rerun_knows_they_are_done(
    tmp_path: Path, output: str, bundle: str
) -> None:
    for shard in range(3):
        tar_of_images(tmp_path / f"shard-{shard}.tar", num_images=4 + shard)
    for shard in (3, 4):
        tar_of_images(tmp_path / f"shard-{shard}.tar", num_images=0)
    config = job(tmp_path / "shard-{0..4}.tar", output, bundle, keep_columns=("n",))
    summary = caption_images(config)
    assert sums_of(summary) == (17, 15, 2)
    assert summary["failed_by_reason"] == {"empty": 2}  # of a tar without samples that is all there is to say
    again = caption_images(config)
    assert (again["read"], again["skipped_done"]) == (0, 17)
    assert captions(output)["image_id"][0] == "shard-0.tar/0000.jpg"
    assert captions(output)["n"].tolist()[:4] == ["0", "1", "2", "3"]
    assert verify(VerifyConfig(table=output))["read"] == 17


def test_a_bucket_with_broken_images_becomes_a_table_in_the_bucket_with_a_caption_or_a_reason_for_each(
    s3: Bucket, bundle: str
) -> None:
    for seed in range(10):
        s3.put(f"photos/deep/{seed:02d}.jpg", encoded(seed=seed))
    s3.put("photos/a name with spaces & ünïcode #1.png", encoded("PNG", seed=11))
    for reason, data in BROKEN.items():
        s3.put(f"photos/broken-{reason}.jpg", data)
    config = job(f"{s3.url}/photos", f"{s3.url}/captions", bundle, storage_options=s3.storage_options)
    summary = caption_images(config)
    assert sums_of(summary) == (15, 11, 4)
    assert summary["failed_by_reason"] == dict.fromkeys(BROKEN, 1)
    assert summary["skipped_done"] == 0
    assert summary["tokens_per_s"] > 0
    proof = verify(VerifyConfig(table=f"{s3.url}/captions", storage_options=s3.storage_options))
    assert (proof["ok"], proof["read"]) == (True, 15)
    found = pd.read_parquet(f"{s3.url}/captions/captions", storage_options=s3.storage_options)
    assert f"{s3.url}/photos/a name with spaces & ünïcode #1.png" in set(found["image_id"])
    failures = pd.read_parquet(f"{s3.url}/captions/failures", storage_options=s3.storage_options)
    assert {Path(row.image_id).stem: row.reason for row in failures.itertuples()} == {
        f"broken-{reason}": reason for reason in BROKEN
    }
    parts = s3.fs.glob(f"{s3.url}/captions/captions/*.parquet")
    assert pq.read_schema(s3.fs.open(parts[0])).remove_metadata() == CAPTIONS
    written = {path: s3.fs.cat_file(path) for path in s3.fs.find(f"{s3.url}/captions/_run")}
    [record] = [json.loads(data) for path, data in written.items() if "/_run/runs/" in path and path.endswith(".json")]
    assert record["summary"] == summary
    assert s3.storage_options["secret"].encode() not in b"".join(written.values())


def test_a_dry_run_writes_nothing(tmp_path: Path, output: str, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = folder_of_images(tmp_path / "images", num_images=3)
    config = job(images, output, bundle)
    summary = caption_images(CaptionJobConfig(**{**vars(config), "dry_run": True}))
    assert (summary["images"], summary["units"], summary["left"]) == (3, 1, 3)
    assert "images    3 in 1 units" in capsys.readouterr().err
    assert not Path(output).exists()


def test_a_job_that_is_to_stop_takes_back_the_read_tasks_that_were_not_begun(tmp_path: Path) -> None:
    stop, num_slices = StopRequest(), 300

    class Noting:  # here: Ray's workers cannot import this module
        def read(self, piece: Slice) -> Iterator[pa.Table]:
            (tmp_path / str(piece.start)).touch()
            time.sleep(0.01)
            yield pa.table({"start": [piece.start]})

    def ask_soon() -> None:
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        stop.signal_number = signal.SIGINT

    unit = Unit(ordinal=0, kind="listing", path="", name="", num_rows=num_slices, size_bytes=None)
    slices = [Slice(unit=unit, start=number, stop=number + 1, attempts={}) for number in range(num_slices)]
    with joined_cluster():
        rows = ray.data.read_datasource(ReadSlices(Noting(), slices), override_num_blocks=num_slices)
        drop_unread_tasks(rows, stop)
        threading.Thread(target=ask_soon, daemon=True).start()
        came = {start for block in ray.get(rows.materialize().to_arrow_refs()) for start in block["start"].to_pylist()}
    begun = {int(file.name) for file in tmp_path.iterdir()}
    assert came == begun, "what was read comes through"
    assert 0 < len(begun) < num_slices / 2
