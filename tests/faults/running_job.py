"""A real caption job in processes of its own, which a test may look for and kill; and what its table holds.

Every process that descends from a job carries a mark in its environment, so that it is found wherever it was adopted,
and ended by its pid.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from captioner.command_line import parse
from captioner.config import VerifyConfig
from captioner.tables.verification import verify
from tests.guard import GUARD_S

ROOT = Path(__file__).parents[2]
MARK = "CAPTIONER_FAULTS_MARK"
KINDS = {
    "captioner": "MapBatches(CaptionWorker)",
    "decoder": "MapBatches(DecodeWorker)",
    "decode child": "captioner.images.child import serve",
    "reader": "ray::ReadImages",
    "writer": "ray::Write",
    "raylet": "/raylet/raylet",
    "gcs": "/gcs/gcs_server",
}
"""What to kill -> what stands in its command line."""

WRITERS_WAIT = """
import glob, os, re, time

SYNC = os.fsync

def fsync(descriptor):
    SYNC(descriptor)
    is_part = re.search("/(captions|features)/[.]part-", os.readlink(f"/proc/self/fd/{descriptor}"))
    while is_part and glob.glob(os.environ["WRITERS_WAIT_WHILE"]):
        time.sleep(0.02)

os.fsync = fsync
"""
"""A sitecustomize: writers wait for as long as a file is there, with a part that is whole and has no name yet."""

_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def flags(bundle: str, *more: str) -> list[str]:
    """What every job of these tests is started with.

    On any number of cores one decoder fetches, two blocks at once, and waits for a store that is held."""
    tempo = ["--max-new-tokens", "6", "--rows-per-part", "128", "--fetch-concurrency", "4"]
    patience = ["--cpu-workers", "1", "--fetch-timeout-s", str(GUARD_S)]
    return ["--model", bundle, *tempo, *patience, *more]


@dataclass
class Job:
    """One `python jobs/caption.py`, started when it is made."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    script: str = "caption.py"

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / self.script), *self.arguments],
            env={**kept, "PYTHONPATH": str(ROOT), MARK: self.mark, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, timeout_s: float = GUARD_S) -> tuple[int, str, str]:
        """Wait for it; return exit code, stdout and stderr."""
        out, log = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, log

    def summary(self, timeout_s: float = GUARD_S) -> dict[str, Any]:
        """Wait for it to succeed and return the last line of its stdout."""
        code, out, log = self.end(timeout_s)
        assert code == 0, f"exit code {code}: {log}"
        return dict(json.loads(out.splitlines()[-1]))

    def pids(self, kind: str | None = None) -> list[int]:
        """The processes of this job that live: all, or those of a kind."""
        return [pid for pid, command in marked(self.mark) if kind is None or KINDS[kind] in command]

    def wait_for(self, kind: str, timeout_s: float = GUARD_S) -> int:
        """Return the pid of a process of a kind, once there is one. Fails if the job ends before."""
        give_up = time.monotonic() + timeout_s
        while not (found := self.pids(kind)):
            assert self.process.poll() is None, f"the job ended before there was a {kind}: {self.end()}"
            assert time.monotonic() < give_up, f"no {kind} among {list(marked(self.mark))}"
            time.sleep(0.02)
        return found[0]

    def kill(self, kind: str, timeout_s: float = GUARD_S) -> int:
        """kill -9 one process of a kind, once there is one; return its pid. Fails if the job ends before."""
        pid = self.wait_for(kind, timeout_s)
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill_driver(self) -> None:
        """kill -9 the driver alone; the rest of its Ray finds out by itself."""
        self.process.kill()
        self.process.communicate()

    def kill_everything(self) -> int:
        """kill -9 every process of the job at once; return how many there were."""
        num_killed = 0
        while found := self.pids():
            for pid in found:
                num_killed += kill(pid)
            time.sleep(0.05)
        self.process.communicate()
        return num_killed


def kill(pid: int) -> bool:
    """kill -9; say whether the process was there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def is_gone(pid: int) -> bool:
    """Say whether a process has ended, be it that nobody has waited for it."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


def marked(mark: str) -> Iterator[tuple[int, str]]:
    """Yield pid and command line of each living process with this mark in its environment."""
    needle = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and needle in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:  # a dead one that nobody has waited for has none
                    yield int(folder.name), command
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def wait_for_nobody(mark: str) -> None:
    """Return when no process with this mark is left but Ray's agents, which write no table and end a minute later."""
    give_up = time.monotonic() + GUARD_S
    while left := [line for _, line in marked(mark) if not line.startswith(_AGENTS)]:
        assert time.monotonic() < give_up, f"still there: {left}"
        time.sleep(0.1)


def num_parts(output: Path, folder: str = "captions") -> int:
    """Return how many parts with captions, or with answers, a local table has."""
    return len(list(output.glob(f"{folder}/*.parquet")))


def wait_for_parts(
    job: Job, output: Path, wanted: int = 1, timeout_s: float = GUARD_S, folder: str = "captions"
) -> None:
    """Return when a table has so many parts. Fails if the job ends before."""
    give_up = time.monotonic() + timeout_s
    while num_parts(output, folder) < wanted:
        assert job.process.poll() is None, f"the job ended before it could be interrupted: {job.end()}"
        assert time.monotonic() < give_up, f"not {wanted} parts after {timeout_s} s"
        time.sleep(0.02)


def table(output: Path | str, storage_options: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """What a table holds, by key: its captions, and the last word on each image that has none."""
    options = dict(storage_options or {}) or None
    captions = pd.read_parquet(f"{output}/captions", storage_options=options)
    assert not captions["key"].duplicated().any(), "a caption came out twice"
    failures = _failures(output, options)
    failures = failures[~failures["key"].isin(captions["key"])]  # a later attempt went well
    rows = pd.concat([captions, failures]).set_index("key").sort_index()
    return rows.drop(columns=["run_id", "attempt", "candidates"])


def _failures(output: Path | str, options: dict[str, Any] | None) -> pd.DataFrame:
    try:
        failures = pd.read_parquet(f"{output}/failures", storage_options=options)
    except FileNotFoundError:
        failures = pd.DataFrame()
    if failures.empty:  # perhaps a folder without a part, which has no columns
        return pd.DataFrame({"key": [], "attempt": []}).astype("int64")
    assert not failures.duplicated(["key", "attempt"]).any(), "an attempt failed twice"
    return failures.sort_values("attempt").drop_duplicates("key", keep="last")


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Assert that two tables hold the same rows, captions and reasons, and scores but for rounding."""
    scores = ["mean_logprob", "min_logprob"]
    pd.testing.assert_frame_equal(found.drop(columns=scores), expected.drop(columns=scores), check_like=True)
    np.testing.assert_allclose(found[scores], expected[scores], atol=1e-4)


def verified(output: str, *more: str) -> Mapping[str, Any]:
    """What jobs/verify.py says of a table; fails unless it finds it whole."""
    found = verify(parse(VerifyConfig, [output, *more]))
    assert found["ok"], found
    return found


def assert_only_parts(output: Path) -> None:
    """Assert that whoever reads the folders of a local table finds whole parts and nothing else."""
    for part in [*output.glob("captions/**/*"), *output.glob("failures/**/*")]:
        if not part.name.startswith((".", "_")):
            pd.read_parquet(part)


def parent(pid: int) -> int:
    """The raylet that started a worker."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
