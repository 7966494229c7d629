"""What share of the ceiling does the Ray job keep, and for what part of the time does the accelerator wait?

    python -m tests.bench.pipeline [--images 8000] [--rounds 2] [--accelerator 1000]

Ceiling: a bare loop in which two processes decode the same files by the same code, with the same environment, and a
simulated accelerator sleeps a fixed time an image. The job: `caption_images` as users run it, on a Ray that believes to
have one GPU, with the same sleep in the place of the model. Both take turns. Rates are those of the steady state: the
first 20 % and the last 10 % of the images are left out. Photographs are drawn, 1024x768, and reach the model at 224
pixels.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from captioner.config import CaptionJobConfig, ImageConfig, ModelConfig, ResourceConfig
from captioner.images import Preprocessing, decode
from captioner.images.child import ENVIRONMENT
from tests.bench.photographs import photograph
from tests.bench.report import at_least, last_line
from tests.bench.stand_ins import LOG, SECONDS_AN_IMAGE, SleepingWorker, run_job
from tests.bundles import save_tiny_bundle

SIZE = (1024, 768)
SIDE = 224
BATCH = 256
NUM_PHOTOS = 24
PROCESSES = 2
TARGET = 0.90


def make_images(folder: Path, num_images: int) -> None:
    """Many names for a few photographs: a job reads and decodes each name by itself."""
    folder.mkdir()
    originals = [folder.parent / f"{seed}.jpg" for seed in range(NUM_PHOTOS)]
    for seed, original in enumerate(originals):
        original.write_bytes(photograph(*SIZE, seed=seed))
    for number in range(num_images):
        os.link(originals[number % NUM_PHOTOS], folder / f"{number:06d}.jpg")


def decode_files(paths: Sequence[str]) -> int:
    preprocessing, config = Preprocessing(size=SIDE, shortest_edge=SIDE), ImageConfig()
    for path in paths:
        decode(Path(path).read_bytes(), preprocessing, config)
    return len(paths)


def bare(folder: Path, seconds_an_image: float) -> list[tuple[float, int]]:
    """Return when the simulated accelerator was done with how many images, without Ray."""
    paths = sorted(str(path) for path in folder.iterdir())
    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    done = []
    with patch.dict(os.environ, ENVIRONMENT), multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for num_images in pool.imap_unordered(decode_files, batches):
            time.sleep(seconds_an_image * num_images)
            done.append((time.time(), num_images))
    return done


def job(folder: Path, bundle: str, seconds_an_image: float) -> tuple[list[tuple[float, int]], dict[str, Any]]:
    """Return the same of the Ray job, its summary, and how long the first row took to be on disk."""
    work = Path(tempfile.mkdtemp(dir=folder.parent))
    os.environ[LOG], os.environ[SECONDS_AN_IMAGE] = str(work / "log"), str(seconds_an_image)
    config = CaptionJobConfig(
        input_path=str(folder),
        output=str(work / "captions"),
        model=ModelConfig(model=bundle),
        resources=ResourceConfig(workers="1"),
    )
    first = threading.Thread(
        target=wait_for_a_part, args=(work / "captions", found := {}, time.monotonic()), daemon=True
    )
    first.start()
    summary = dict(run_job(config, SleepingWorker))
    first.join()
    done = [(at, count) for at, count in map(json.loads, (work / "log").read_text().splitlines())]
    shutil.rmtree(work)
    return done, summary | found


def wait_for_a_part(output: Path, found: dict[str, float], start: float) -> None:
    while not list(output.glob("captions/part-*.parquet")):
        time.sleep(0.05)
    found["first_row_s"] = time.monotonic() - start


def steady_rate(done: list[tuple[float, int]]) -> float:
    """Return images a second between the first 20 % and the last 10 % of the images."""
    total, passed, kept = sum(count for _, count in done), 0, []
    for at, count in sorted(done):
        passed += count
        if 0.2 * total <= passed <= 0.9 * total:
            kept.append((at, passed))
    return (kept[-1][1] - kept[0][1]) / (kept[-1][0] - kept[0][0])


def compare(folder: Path, bundle: str, rounds: int, seconds_an_image: float) -> dict[str, Any]:
    bare_rates, job_rates, summaries = [], [], []
    for _ in range(rounds):
        bare_rates.append(steady_rate(bare(folder, seconds_an_image)))
        done, summary = job(folder, bundle, seconds_an_image)
        job_rates.append(steady_rate(done))
        summaries.append(summary)
        print(
            f"bare {bare_rates[-1]:7.1f} images/s   job {job_rates[-1]:7.1f}"
            f"   share {job_rates[-1] / bare_rates[-1]:.3f}"
            f"   whole job {summary['images_per_s']:7.1f}   model waited {summary['model_waited_share']:.2f}"
            f"   first row after {summary['first_row_s']:.1f} s",
            flush=True,
        )
    shares = [mine / ceiling for mine, ceiling in zip(job_rates, bare_rates, strict=True)]
    return {
        "bare_images_per_s": statistics.median(bare_rates),
        "job_images_per_s": statistics.median(job_rates),
        "share": statistics.median(shares),
        "shares": [round(share, 3) for share in shares],
        "model_waited_share": statistics.median(summary["model_waited_share"] for summary in summaries),
        "model_waited_share_of_bare": max(0.0, 1 - statistics.median(bare_rates) * seconds_an_image),
        "first_row_s": statistics.median(summary["first_row_s"] for summary in summaries),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--accelerator", type=float, default=1000.0, help="images/s that the simulated one can do")
    args = parser.parse_args()
    os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"GPU": 1})
    work = Path(tempfile.mkdtemp())
    try:
        bundle = save_tiny_bundle(work / "bundle", image_size=SIDE)
        make_images(work / "images", args.images)
        found = compare(work / "images", bundle, args.rounds, 1 / args.accelerator)
    finally:
        shutil.rmtree(work)
    print(last_line("pipeline", {"share": at_least(found["share"], TARGET)}, images=args.images, values=found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
