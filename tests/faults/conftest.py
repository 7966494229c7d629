"""What the tests of faults share: images good and bad, in a slow store, in tars and in tables; a bundle; and the tables
of unbroken runs."""

import io
import math
import os
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bundles import save_tiny_bundle
from tests.faults.job_without_ray import captioned_without_ray
from tests.faults.running_job import MARK, Job, flags, kill, marked, table
from tests.guard import GUARD_S
from tests.http_server import SlowStore, serving
from tests.sample_images import BROKEN, encoded

NUM_IMAGES = 1500
_LATENCY_S = 0.02
NUM_PACKED = 1440  # images that take a while to decode, so that a job over local files, too, can be killed in
_PER_FILE = 240


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def store() -> Iterator[SlowStore]:
    """Images over HTTP, one in fifty damaged or gone."""
    server = SlowStore()
    bad = [BROKEN[name] for name in ("empty", "not_an_image", "corrupt")] + [None]
    for seed in range(NUM_IMAGES):
        data = bad[seed // 50 % len(bad)] if seed % 50 == 49 else encoded(seed=seed)
        if data is not None:
            server.files[f"/{seed:05d}.jpg"] = data
    with serving(server):
        yield server


@pytest.fixture(scope="session")
def images(store: SlowStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of the images of the store."""
    listed = tmp_path_factory.mktemp("images") / "images.txt"
    listed.write_text("".join(f"{store.url(f'{seed:05d}.jpg')}\n" for seed in range(NUM_IMAGES)))
    return listed


@pytest.fixture
def start(bundle: str, store: SlowStore) -> Iterator[Callable[..., Job]]:
    """Start jobs; whatever is left of them at the end of the test is killed."""
    jobs: list[Job] = []
    store.latency_s = _LATENCY_S

    def begin(input_path: Any, output: Any, *more: str, **environment: str) -> Job:
        jobs.append(Job([str(input_path), str(output), *flags(bundle, *more)], environment))
        return jobs[-1]

    yield begin
    store.latency_s = 0
    store.hold_after(math.inf)
    for job in jobs:
        job.kill_everything()


@pytest.fixture
def finish(bundle: str, store: SlowStore) -> Callable[..., dict[str, Any]]:
    """Do without Ray what is left of a job, whose store then answers at once; return the summary."""

    def caption(input_path: Any, output: Any, *more: str) -> dict[str, Any]:
        store.latency_s = 0
        store.hold_after(math.inf)
        return captioned_without_ray([str(input_path), str(output), *flags(bundle, *more)])

    return caption


@pytest.fixture(scope="session")
def unbroken(images: Path, bundle: str, store: SlowStore, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The table of a run that nothing interrupted."""
    output, store.latency_s = tmp_path_factory.mktemp("unbroken"), 0
    return unbroken_run(images, bundle, output, NUM_IMAGES)


def packed_images() -> list[bytes]:
    """Images of 1200x900 pixels, one in fifty damaged."""
    bad = [BROKEN[name] for name in ("empty", "not_an_image", "corrupt")]
    good = [encoded(seed=seed, size=(1200, 900)) for seed in range(61)]
    return [bad[place // 50 % len(bad)] if place % 50 == 49 else good[place % len(good)] for place in range(NUM_PACKED)]


def tar_of(bodies: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, body in enumerate(bodies):
            info = tarfile.TarInfo(f"{number:04d}.jpg")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def table_of(bodies: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": bodies}), buffer, row_group_size=20, compression="none")
    return buffer.getvalue()


_ENCODE = {"tar": tar_of, "parquet": table_of}


def pack(folder: Path, ending: str) -> Path:
    """Write those images into files of a kind, and return their folder."""
    images = packed_images()
    for start in range(0, NUM_PACKED, _PER_FILE):
        (folder / f"{start:04d}.{ending}").write_bytes(_ENCODE[ending](images[start : start + _PER_FILE]))
    return folder


@pytest.fixture(scope="session", params=["tar", "parquet"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tars, then one of tables with the images in them."""
    return pack(tmp_path_factory.mktemp("packed"), request.param)


def unbroken_run(images: Path, bundle: str, output: Path, num_images: int = NUM_PACKED) -> pd.DataFrame:
    """Caption images without Ray, and return their table."""
    assert captioned_without_ray([str(images), str(output), *flags(bundle)])["read"] == num_images
    return table(output)


@pytest.fixture(scope="session")
def unbroken_packed(packed: Path, bundle: str, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The table of a run over `packed` that nothing interrupted."""
    return unbroken_run(packed, bundle, tmp_path_factory.mktemp("unbroken"))


_CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
print("cluster", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[tuple[str, str]]:
    """A Ray of two nodes beside its head: its address, and the mark of its processes."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _CLUSTER],
        env={**os.environ, MARK: mark, "RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield next(line.split()[1] for line in process.stdout if line.startswith("cluster ")), mark
        process.communicate(timeout=GUARD_S)  # the end of its stdin is its sign to go
    finally:
        for pid, _ in marked(mark):
            kill(pid)
        process.wait()
