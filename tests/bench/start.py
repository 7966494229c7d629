"""How long from the command to the first caption and to the prompt, and how soon is wrong use told?

    python -m tests.bench.start [--baseline WORKTREE] [--rounds 3]

Runs jobs/caption.py on the demo, a wrong path and --help, each in a fresh process; with --baseline in turn with the
code of another git worktree. Ceiling: what cannot be avoided with Ray Data is in no figure here; CPU seconds of all
processes over the number of cores are the floor of the time, so that they are told beside it, and so is the load of
the machine. The first caption is the first part on disk. A first run in a new environment also compiles bytecode.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from captioner.machine import num_cpus
from tests.bench.report import at_most, last_line

ROOT = Path(__file__).parent.parent.parent
MARK = "BENCH_START_RUN"
LOOK_EVERY_S = 0.05
LINES = {"left": "planned", "device=": "Ray is there", "took": "summary"}
"""What lines of stderr begin with, or hold, and what they say of the job."""

PROCESSES = {"gcs_server": "GCS server", "raylet": "raylet", "ray::MapWorker(MapBatches(CaptionWorker": "model worker"}
"""What command lines begin with, and which process that is."""


@dataclass
class Run:
    """One command: seconds from its start, and the processor time of every process that came of it."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    load: float = 0.0
    events: dict[str, float] = field(default_factory=dict)


class Processes:
    """The processor time of all processes whose environment has a mark, as far as it was seen."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._is_ours: dict[int, bool] = {}
        self._seconds: dict[int, float] = {}

    def look(self) -> Iterator[str]:
        """Read every process; yield the command lines of ours."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._knows(entry):
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    yield (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue
                self._seconds[int(entry.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def cpu_seconds(self) -> float:
        return sum(self._seconds.values())

    def _knows(self, entry: Path) -> bool:
        pid = int(entry.name)
        if not self._is_ours.get(pid):
            try:
                self._is_ours[pid] = self._mark in (entry / "environ").read_bytes()
            except OSError:
                return False
        return self._is_ours[pid]


def run(code: Path, *arguments: str, part_in: Path | None = None) -> Run:
    """Run jobs/caption.py of a worktree and return what it took; its own exit code is not looked at."""
    mark = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": str(code), MARK: mark}
    found, processes = Run(load=os.getloadavg()[0]), Processes(mark)
    start = time.monotonic()
    command = [sys.executable, str(code / "jobs" / "caption.py"), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd="/"
    ) as job:
        reader = threading.Thread(target=note_lines, args=(job, found, start))
        reader.start()
        while job.poll() is None:
            for line in processes.look():
                for beginning, name in PROCESSES.items():
                    if line.rpartition("/")[2].startswith(beginning) or line.startswith(beginning):
                        found.events.setdefault(name, time.monotonic() - start)
            if part_in is not None and next(part_in.glob("captions/*.parquet"), None):
                found.events.setdefault("first caption", time.monotonic() - start)
            time.sleep(LOOK_EVERY_S)
        found.seconds = time.monotonic() - start
        reader.join()
    found.cpu_seconds = processes.cpu_seconds()
    return found


def note_lines(job: "subprocess.Popen[str]", found: Run, start: float) -> None:
    assert job.stderr is not None
    for line in job.stderr:
        for words, name in LINES.items():
            if line.startswith(words) or words in line:
                found.events.setdefault(name, time.monotonic() - start)


def demo(code: Path) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        found = run(code, "demo", str(out), part_in=out)
    assert "first caption" in found.events, f"no caption came of {code}"
    return found


def rounds_of(codes: Mapping[str, Path], rounds: int) -> dict[str, list[Run]]:
    """Return the demo runs of each code, in turn; every other round goes in reversed order."""
    found: dict[str, list[Run]] = {name: [] for name in codes}
    for number in range(rounds):
        for name in list(codes)[:: -1 if number % 2 else 1]:
            one = demo(codes[name])
            found[name].append(one)
            print(
                f"{name:9} {one.seconds:6.1f} s, first caption {one.events['first caption']:6.1f} s,"
                f" CPU {one.cpu_seconds:5.1f} s, load {one.load:4.1f} ",
                ", ".join(f"{event} {at:.1f}" for event, at in sorted(one.events.items(), key=lambda e: e[1])),
                flush=True,
            )
    return found


def medians(runs: list[Run]) -> dict[str, float]:
    return {
        "whole_s": round(statistics.median(one.seconds for one in runs), 2),
        "first_caption_s": round(statistics.median(one.events["first caption"] for one in runs), 2),
        "cpu_s": round(statistics.median(one.cpu_seconds for one in runs), 2),
        "load": round(statistics.median(one.load for one in runs), 1),
    }


def told(code: Path, rounds: int, *arguments: str) -> dict[str, float]:
    runs = [run(code, *arguments) for _ in range(rounds)]
    return {
        "seconds": round(statistics.median(one.seconds for one in runs), 2),
        "cpu_s": round(statistics.median(one.cpu_seconds for one in runs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="a git worktree whose code takes turns with this one's")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    codes = {"this": ROOT} | ({"baseline": options.baseline.resolve()} if options.baseline else {})
    runs = {name: medians(found) for name, found in rounds_of(codes, options.rounds).items()}
    quick = {
        name: {
            "help": told(code, options.rounds, "--help"),
            "wrong_path": told(code, options.rounds, "/nowhere", "out"),
            "wrong_model": told(code, options.rounds, "demo", "out", "--model", "/nowhere"),
        }
        for name, code in codes.items()
    }
    for name in codes:
        print(f"{name:9} medians {runs[name]}; {quick[name]}")
    ours = quick["this"]
    targets = {
        "whole_s": at_most(runs["this"]["whole_s"], 13.0),
        "first_caption_s": at_most(runs["this"]["first_caption_s"], 11.5),
        "help_s": at_most(ours["help"]["seconds"], 0.7),
        "wrong_path_s": at_most(ours["wrong_path"]["seconds"], 1.5),
        "wrong_model_s": at_most(ours["wrong_model"]["seconds"], 1.5),
    }
    print(last_line("start", targets, cores=num_cpus(), runs=runs, told=quick))


if __name__ == "__main__":
    main()
