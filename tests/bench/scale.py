"""Does a job of a million images stay as quick and as small as one of ten thousand?

    python -m tests.bench.scale [--images 10000,100000,1000000] [--listing 20000]

The job is `caption_images` with a model that gives one caption to all (32 pixels): real small JPEGs and PNGs under a
million names in local folders, the real stages on a local Ray, the real table. As the model takes no CPU, Ray believes
to have a GPU for it, so that all cores decode. Shown for each size: rows a second of
the whole job, and of it after the first 20 %; the greatest memory of each kind of process, its own without what it
shares. Then the listing of a bucket on an S3 server on loopback, beside the server's own pages.

Then 10 % of the largest table's parts are removed and the job is planned again: what resuming adds to the start. And a
job with a real model is ended by Ctrl-C and by SIGTERM in the middle of its work: how long that takes.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from captioner.captioning.plan import plan_job
from captioner.config import CaptionJobConfig, InputConfig, ModelConfig
from captioner.inputs import freeze
from tests.bench.report import at_least, at_most, last_line
from tests.bench.stand_ins import NullWorker, run_job
from tests.bundles import save_tiny_bundle
from tests.conftest import running_s3_server
from tests.sample_images import encoded

ROOT = Path(__file__).parents[2]
NUM_ORIGINALS = 1000
FOLDER_IMAGES = 10_000
MIB = 1 << 20


def make_images(folder: Path, num_images: int) -> None:
    """Many names for a thousand small files: a job reads and decodes each name by itself."""
    folder.mkdir()
    originals = [folder.parent / f"original-{seed}" for seed in range(NUM_ORIGINALS)]
    for seed, original in enumerate(originals):
        if not original.exists():
            original.write_bytes(encoded("JPEG" if seed % 2 else "PNG", seed=seed))
    for start in range(0, num_images, FOLDER_IMAGES):
        below = folder / f"{start // FOLDER_IMAGES:04d}"
        below.mkdir()
        for number in range(start, min(num_images, start + FOLDER_IMAGES)):
            os.link(originals[number % NUM_ORIGINALS], below / f"{number:07d}.jpg")


class Sample(NamedTuple):
    """What the processes below this one had taken at a time: each kind's greatest memory, its CPU seconds so far."""

    at: float
    memory_mib: dict[str, float]
    cpu_s: dict[str, float]


class Watch:
    """Looks at the processes below this one, by kind, twice a second."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._cpu_s: dict[int, tuple[str, float]] = {}  # by pid, those that have ended too

    def look(self) -> None:
        memory: dict[str, float] = defaultdict(float)
        for pid in descendants(os.getpid()):
            kind, own_mib, shared_mib, cpu_s = process(pid)
            if kind:
                self._cpu_s[pid] = kind, cpu_s
                memory[kind] = max(memory[kind], own_mib)
                memory["object store"] = max(memory["object store"], shared_mib)
        cpu: dict[str, float] = defaultdict(float)
        for kind, cpu_s in self._cpu_s.values():
            cpu[kind] += cpu_s
        self.samples.append(Sample(time.time(), dict(memory), dict(cpu)))

    def most_mib(self) -> dict[str, int]:
        """Return the greatest memory of each kind."""
        kinds = sorted({kind for sample in self.samples for kind in sample.memory_mib})
        return {kind: round(max(sample.memory_mib.get(kind, 0) for sample in self.samples)) for kind in kinds}

    def cpu_us_a_row(self, steady: "Steady") -> dict[str, int]:
        """Return the CPU time that the processes of each kind took for a row of the steady state."""
        before, after = (
            max((sample for sample in self.samples if sample.at <= at), key=attrgetter("at"), default=self.samples[0])
            for at in (steady.start, steady.stop)
        )
        rows = steady.rows_per_s * (after.at - before.at)
        taken = {kind: after.cpu_s[kind] - before.cpu_s.get(kind, 0.0) for kind in sorted(after.cpu_s)}
        return {kind: round(1e6 * seconds / rows) for kind, seconds in taken.items()} if rows else {}


@contextmanager
def watched() -> Iterator[Watch]:
    watch, ended = Watch(), threading.Event()

    def keep_looking() -> None:
        while not ended.wait(0.5):
            watch.look()

    thread = threading.Thread(target=keep_looking)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


def descendants(root: int) -> list[int]:
    """Return the root's and its children's pids, at any depth."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:  # it ended
            continue
        parents[int(status.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def process(pid: int) -> tuple[str, float, float, float]:
    """Return what kind of process it is, its own memory and what it has of shared files in MiB, its CPU seconds."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "", 0.0, 0.0, 0.0
    sizes = {name: int(kb) / 1024 for name, kb in re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE)}
    cpu_s = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return kind_of(pid, command), sizes.get("RssAnon", 0.0), sizes.get("RssShmem", 0.0), cpu_s


def kind_of(pid: int, command: str) -> str:
    if pid == os.getpid():
        return "driver"
    for word, kind in (
        ("MapWorker(MapBatches(DecodeWorker", "decode worker"),
        ("MapWorker(MapBatches(NullWorker", "model worker"),
        ("captioner.images.child", "decode child"),
        ("gcs_server", "gcs"),
        ("raylet/raylet", "raylet"),
        ("ray::", "read and write tasks"),
    ):
        if word in command:
            return kind
    return ""


def run(folder: Path, bundle: str, output: Path, num_images: int) -> dict[str, Any]:
    config = CaptionJobConfig(input_path=str(folder), output=str(output), model=ModelConfig(model=bundle))
    start = time.monotonic()
    with watched() as watch:
        summary = run_job(config, NullWorker)
    seconds = time.monotonic() - start
    assert summary["captioned"] == num_images, summary
    steady = steady_state(output)
    found = {
        "images": num_images,
        "seconds": round(seconds, 1),
        "job_seconds": summary["seconds"],
        "rows_per_s": round(num_images / seconds),
        "steady_rows_per_s": round(steady.rows_per_s),
        "cpu_us_a_row": watch.cpu_us_a_row(steady),
        "memory_mib": watch.most_mib(),
        "memory_mib_by_fifths": by_fifths(watch.samples),
    }
    print(
        f"{num_images:>9,} images {seconds:7.1f} s {found['rows_per_s']:>7,} rows/s,"
        f" steady {found['steady_rows_per_s']:>7,}   MiB: {listed(found['memory_mib'])}"
        f"   CPU us a row: {listed(found['cpu_us_a_row'])}",
        flush=True,
    )
    return found


def listed(figures: dict[str, int]) -> str:
    return ", ".join(f"{kind} {figure}" for kind, figure in figures.items())


def by_fifths(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the greatest memory of each kind in each fifth of the time: flat, or growing."""
    start, stop = samples[0].at, samples[-1].at + 1e-6
    fifths: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
    for sample in samples:
        fifth = int(5 * (sample.at - start) / (stop - start))
        for kind, mib in sample.memory_mib.items():
            fifths[kind][fifth] = max(fifths[kind][fifth], mib)
    return {kind: [round(mib) for mib in values] for kind, values in fifths.items()}


class Steady(NamedTuple):
    """From the part at 20 % of the rows to the one at 100 %: when, and how quick."""

    start: float
    stop: float
    rows_per_s: float


def steady_state(output: Path) -> Steady:
    parts = sorted((path.stat().st_mtime, int(path.stem.split("-")[-2])) for path in output.glob("captions/*.parquet"))
    total, passed, kept = sum(rows for _, rows in parts), 0, []
    for at, rows in parts:
        passed += rows
        if passed >= 0.2 * total:
            kept.append((at, passed))
    (start, before), (stop, after) = kept[0], kept[-1]
    return Steady(start, stop, (after - before) / (stop - start) if stop > start else 0.0)


def resume(folder: Path, bundle: str, output: Path, num_images: int) -> dict[str, Any]:
    """Return what planning takes once a tenth of the parts is gone again."""
    for part in sorted(output.glob("captions/*.parquet"))[::10]:
        part.unlink()
    config = CaptionJobConfig(input_path=str(folder), output=str(output), model=ModelConfig(model=bundle))
    start = time.monotonic()
    plan = plan_job(config)
    seconds = time.monotonic() - start
    print(f"{num_images:>9,} images, {plan.num_left:,} left: planned in {seconds:.2f} s", flush=True)
    return {"images": num_images, "left": plan.num_left, "seconds": round(seconds, 2)}


def interrupt(folder: Path, bundle: str, output: Path) -> dict[str, float]:
    """Return the seconds from a signal to the end of a job that is in the middle of its work, real model and all."""
    seconds = {}
    command = [sys.executable, str(ROOT / "jobs" / "caption.py"), str(folder), str(output), "--model", bundle]
    for ending in (signal.SIGINT, signal.SIGTERM):
        known = set(output.glob("captions/*.parquet"))
        with subprocess.Popen([*command, "--rows-per-part", "256"], stderr=subprocess.PIPE, text=True) as job:
            assert job.stderr is not None
            while set(output.glob("captions/*.parquet")) == known:
                assert job.poll() is None, "the job ended before it could be interrupted"
                time.sleep(0.05)
            start = time.monotonic()
            job.send_signal(ending)
            log = job.stderr.read()
        seconds[ending.name] = round(time.monotonic() - start, 2)
        assert "the same command continues" in log, log
    print(f"from a signal to the end: {seconds}", flush=True)
    return seconds


def list_bucket(num_objects: int) -> dict[str, Any]:
    """Return how quick our listing of a bucket is, beside a bare loop over the server's pages."""
    with running_s3_server() as server, tempfile.TemporaryDirectory() as folder:
        options = server.storage_options
        fs = fsspec.filesystem("s3", **options, use_listings_cache=False)
        fs.call_s3("create_bucket", Bucket="bench")
        for start in range(0, num_objects, 1000):
            fs.pipe({f"bench/photos/{n:07d}.jpg": b"x" for n in range(start, min(num_objects, start + 1000))})
        seconds = {"bare": [], "ours": []}
        for turn in range(2):
            begin = time.perf_counter()
            assert sum(bare_pages(fs)) == num_objects
            seconds["bare"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            frozen = freeze("s3://bench/photos/", InputConfig(storage_options=options), f"{folder}/{turn}")
            seconds["ours"].append(time.perf_counter() - begin)
            assert frozen.num_images == num_objects
    rates = {name: num_objects / min(values) for name, values in seconds.items()}
    print(f"{num_objects:>9,} objects listed: {rates['ours']:,.0f}/s, pages alone {rates['bare']:,.0f}/s", flush=True)
    return {"objects": num_objects, "listed_per_s": round(rates["ours"]), "pages_alone_per_s": round(rates["bare"])}


def bare_pages(fs: Any) -> Iterator[int]:
    more: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_objects_v2", Bucket="bench", Prefix="photos/", MaxKeys=1000, **more)
        yield len(page["Contents"])
        if not page["IsTruncated"]:
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="10000,100000,1000000", help="sizes of the jobs, ascending; empty for none")
    parser.add_argument("--listing", type=int, default=20_000, help="objects in the bucket; 0 for none")
    args = parser.parse_args()
    sizes = [int(size) for size in args.images.split(",") if size]
    values: dict[str, Any] = {}
    os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"GPU": 1})
    work = Path(tempfile.mkdtemp())
    try:
        if sizes:
            folders = {size: work / f"images-{size}" for size in sizes}
            for size, folder in folders.items():
                make_images(folder, size)
            bundle = save_tiny_bundle(work / "bundle")
            values["jobs"] = [run(folder, bundle, work / f"out-{size}", size) for size, folder in folders.items()]
            values["interrupt_s"] = interrupt(folders[sizes[-1]], bundle, work / "interrupted")
            values["resume"] = resume(folders[sizes[-1]], bundle, work / f"out-{sizes[-1]}", sizes[-1])
        if args.listing:
            values["listing"] = list_bucket(args.listing)
    finally:
        shutil.rmtree(work)
    print(last_line("scale", targets_of(values), values=values))
    return 0


def targets_of(values: dict[str, Any]) -> dict[str, Any]:
    """Return the targets of what was measured."""
    targets = {}
    if "jobs" in values:
        targets["rows_per_s"] = at_least(values["jobs"][-1]["rows_per_s"], 5000)
        targets["resume_s"] = at_most(values["resume"]["seconds"], 5)
    if "listing" in values:
        targets["listed_per_s"] = at_least(values["listing"]["listed_per_s"], 5000)
    return targets


if __name__ == "__main__":
    sys.exit(main())
