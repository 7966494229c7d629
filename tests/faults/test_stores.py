"""A store that throttles, resets, hangs, cuts its answers short and loses our credentials, behind a real S3 server."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from captioner.config import InputConfig
from captioner.inputs import freeze, read_unit
from captioner.storage import open_store
from captioner.storage.faults import StoreError
from tests.conftest import Bucket
from tests.faults.conftest import table_of, tar_of
from tests.faults.faulting_proxy import KINDS, FaultingProxy, Outage, Weather
from tests.faults.running_job import Job, assert_same, table, verified
from tests.http_server import SlowStore

pytestmark = pytest.mark.slow

Start = Callable[..., Job]
NUM_IMAGES = 400


@pytest.fixture
def proxy(s3: Bucket) -> Iterator[FaultingProxy]:
    with FaultingProxy(s3.endpoint) as running:
        yield running


def options(s3: Bucket, proxy: FaultingProxy) -> dict[str, Any]:
    """What reaches the store through the proxy, with timeouts that a test can wait for."""
    return {**s3.storage_options, "endpoint_url": proxy.endpoint, "config_kwargs": {"read_timeout": 1}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captioner.storage.fsspec_store.pause_s", lambda *_: 0.02)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "encode"), [("s.tar", tar_of), ("t.parquet", table_of)])
def test_tars_and_tables_are_read_whole_through_any_fault(
    s3: Bucket, proxy: FaultingProxy, tmp_path: Path, kind: str, name: str, encode: Callable[[list[bytes]], bytes]
) -> None:
    bodies = [np.random.default_rng(number).bytes(150_000) for number in range(100)]
    url = s3.put(name, encode(bodies))
    config = InputConfig(storage_options=options(s3, proxy))
    methods = ["GET"] if kind == "expired" else ["GET", "HEAD"]  # S3 gives no reason where it gives no body
    proxy.weather = [Weather(seed=3, share=0.6, kinds=[kind], methods=methods, burst=2)]
    frozen = freeze(url, config, str(tmp_path))
    tables = read_unit(frozen.units[0], frozen.columns, config, run_folder=str(tmp_path))
    assert [row["data"] for table in tables for row in table.to_pylist()] == bodies
    assert proxy.injected[kind], "the injector did nothing"


@pytest.mark.usefixtures("quick")
def test_a_listing_through_faults_has_every_object_once(
    s3: Bucket, proxy: FaultingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captioner.storage.s3_store.PAGE_SIZE", 50)
    names = [f"in/{number:05d}.jpg" for number in range(320)]
    s3.fs.pipe({f"{s3.name}/{name}": b"x" for name in names})
    proxy.weather = [Weather(seed=5, share=0.5, kinds=["throttled", "reset", "short"], burst=1)]
    store = open_store(s3.url, options(s3, proxy))
    for _ in range(4):
        found = [entry.url for page in store.pages(f"{s3.url}/in/") for entry in page]
        assert found == [f"{s3.url}/{name}" for name in names]
    assert proxy.injected, "the injector did nothing"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_written_through_faults_is_whole_or_absent(s3: Bucket, proxy: FaultingProxy, kind: str) -> None:
    proxy.weather = [Weather(seed=7, share=0.5, kinds=[kind], burst=2)]
    store, data = open_store(s3.url, options(s3, proxy)), random.Random(0).randbytes(9 << 20)  # several parts on S3
    written = []
    for number in range(6):
        with contextlib.suppress(StoreError):
            store.write_atomic(f"{s3.url}/out/{number}", data[: len(data) >> number])
            written.append(number)
    assert proxy.injected[kind], "the injector did nothing"
    found = {int(path.rpartition("/")[2]): s3.fs.cat_file(path) for path in s3.fs.ls(f"{s3.name}/out")}
    assert set(written) <= set(found)
    assert all(body == data[: len(data) >> number] for number, body in found.items())
    assert len(written) >= 5


@pytest.mark.usefixtures("quick")
def test_a_job_behind_a_failing_store_ends_after_a_rerun_with_the_unbroken_table(
    start: Start,
    finish: Callable[..., dict[str, Any]],
    store: SlowStore,
    s3: Bucket,
    proxy: FaultingProxy,
    unbroken: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bad weather all the time; midway the credentials are lost for a while to read, then to write until the rerun."""
    names = [Path(uri).name for uri in unbroken["image_id"][:NUM_IMAGES]]
    s3.fs.pipe({f"{s3.name}/in/{name}": store.files[f"/{name}"] for name in names if f"/{name}" in store.files})
    listed = s3.put("list.txt", "".join(f"{s3.url}/in/{name}\n" for name in names).encode())
    environment = {**s3.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
    images, parts = f"/{s3.name}/in/", f"/{s3.name}/table/captions"
    bad = [
        Weather(seed=1, share=0.05, prefix=images),
        Weather(seed=2, share=0.1, prefix=f"/{s3.name}", kinds=["throttled", "reset", "short"]),
    ]
    more = ("--fetch-timeout-s", "8", "--fetch-concurrency", "16")

    proxy.weather = bad
    first = start(listed, f"{s3.url}/table", *more, **environment)
    _wait_for(first, lambda: proxy.num_passed > NUM_IMAGES // 3)
    proxy.weather = [Outage("expired", ["GET"], images), *bad]
    _wait_for(first, lambda: proxy.injected["expired"] > 30)
    proxy.weather = [Outage("expired", ["PUT", "POST"], parts), *bad]
    code, _, log = first.end()
    assert code == 1, log
    assert "error: " in log
    assert "ExpiredToken" in log
    assert "secret-of-the-test" not in log

    proxy.weather = bad
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finish(listed, f"{s3.url}/table", *more)
    proxy.weather = []  # it, too, may have taken an image for a while
    finish(listed, f"{s3.url}/table")  # with time: a busy machine may need those 8 s
    assert set(proxy.injected) == set(KINDS), f"the injector did not do everything: {proxy.injected}"
    assert_same(_comparable(table(f"{s3.url}/table", s3.storage_options)), _comparable(unbroken[:NUM_IMAGES]))
    verified(f"{s3.url}/table")


def _wait_for(job: Job, is_there: Callable[[], bool]) -> None:
    while not is_there():
        assert job.process.poll() is None, f"the job ended before the fault could be injected: {job.end()}"
        time.sleep(0.02)


def _comparable(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as they are wherever the images lie: without their store's address and words."""
    names = rows["image_id"].str.rpartition("/")[2]
    return rows.assign(image_id=names).drop(columns=["detail"])
