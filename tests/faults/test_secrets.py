"""Credentials of a job: in no line that it prints, no file that it writes and no log of its Ray."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Bucket
from tests.faults.running_job import Job
from tests.sample_images import encoded

pytestmark = pytest.mark.slow

SECRET = b"secret-of-the-test"


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray writes its logs; a short path, for its sockets lie there too."""
    folder = Path(tempfile.mkdtemp(prefix="r"))
    yield folder
    shutil.rmtree(folder)


def test_credentials_are_in_no_output_no_table_and_no_log(
    start: Callable[..., Job], s3: Bucket, tmp_path: Path, ray_folder: Path
) -> None:
    uris = [s3.put(f"in/{seed}.jpg", encoded(seed=seed)) for seed in range(8)]
    bad = ["s3://AKIA:secret-of-the-test@bucket/x.jpg", "https://no.such.host.invalid/x.jpg?sig=secret-of-the-test"]
    listed = s3.put("list.txt", "\n".join([*uris, *bad, f"{s3.url}/in/none.jpg"]).encode())
    login = json.dumps(s3.storage_options)
    more = ("--storage-options", login, "--fetch-timeout-s", "60")
    job = start(listed, tmp_path / "table", *more, RAY_TMPDIR=str(ray_folder))
    code, out, log = job.end()
    assert code == 0, log
    assert json.loads(out.splitlines()[-1])["captioned"] == 8
    assert SECRET.decode() not in out + log
    logs = list(_files(ray_folder))
    assert len(logs) > 10, "this is not where Ray writes its logs"
    written = [path for path in _files(tmp_path / "table") if path.parent.name != "listing"]
    assert [str(path) for path in [*written, *logs] if SECRET in path.read_bytes()] == []


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
