"""Images that end the process that decodes them: each is named and set aside, its neighbours are captioned."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tests.faults.running_job import ROOT, Job, verified
from tests.sample_images import encoded

pytestmark = pytest.mark.slow

_HOSTILE = """
import os, signal, sys

if any("captioner.images.child" in word for word in sys.orig_argv):  # in decode children only
    from PIL import Image

    honest = Image.open

    def hostile(file, *arguments, **options):
        verb = file.getvalue()[:8]
        if verb == b"SEGFAULT":
            os.kill(os.getpid(), signal.SIGSEGV)
        if verb == b"OUTOFMEM":
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does to who takes too much
        if verb == b"HANGHANG":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            while True:
                pass
        return honest(file, *arguments, **options)

    Image.open = hostile
"""


def test_an_image_that_ends_its_decoder_is_named_and_its_neighbours_are_captioned(
    start: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(_HOSTILE)
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(60):
        (images / f"{seed:02d}.jpg").write_bytes(encoded(seed=seed))
    culprits = {"10.jpg": b"SEGFAULT", "30.jpg": b"OUTOFMEM", "50.jpg": b"HANGHANG"}
    for name, verb in culprits.items():
        (images / name).write_bytes(verb)
    path = f"{tmp_path / 'site'}:{ROOT}"
    job = start(images, tmp_path / "table", "--decode-timeout-s", "10", PYTHONPATH=path)
    summary = job.summary()
    assert (summary["captioned"], summary["failed"]) == (57, 3)
    failures = pd.read_parquet(tmp_path / "table/failures")
    details = {Path(row.image_id).name: row.detail for row in failures.itertuples()}
    assert set(details) == set(culprits)
    assert "SIGSEGV" in details["10.jpg"]
    assert "SIGKILL" in details["30.jpg"]
    assert failures.set_index(failures["image_id"].str[-6:])["reason"]["50.jpg"] == "decode_timeout"
    verified(str(tmp_path / "table"))
