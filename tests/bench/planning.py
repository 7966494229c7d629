"""How far is what `jobs/plan.py` predicts from what the job then takes?

    python -m tests.bench.planning [--images 1000 4000] [--sample 256]

Draws labelled scenes, plans the job and runs it, each in a process of its own as a user does, at each size. The ratio
is the predicted time of the whole job, with the start of Ray, to the measured one; the target is 0.75 to 1.25 at each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from captioner.demo.scenes import write_folder
from tests.bench.report import at_most, last_line

ROOT = Path(__file__).parents[2]
TARGET = 0.25


def summary_of(job: str, *arguments: str) -> dict[str, Any]:
    """Return the last line of a job of this repository."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / job), *arguments],
        env={**kept, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(num_images: int, sample: int) -> dict[str, Any]:
    """Plan and run one job; return its seconds as predicted and as measured."""
    with tempfile.TemporaryDirectory() as folder:
        images, output = Path(folder, "scenes"), Path(folder, "captions")
        write_folder(images, "train", num_images)
        job = (str(images), str(output), "--model", "demo")
        planned = summary_of("plan.py", *job, "--sample", str(sample))
        captioned = summary_of("caption.py", *job)
    predicted, actual = planned["here"]["hours"] * 3600, captioned["seconds"]
    return {
        "images": num_images,
        "predicted_s": round(predicted, 2),
        "actual_s": actual,
        "ratio": round(predicted / actual, 3),
        "bottleneck": planned["here"]["bottleneck"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--sample", type=int, default=256)
    given = parser.parse_args()
    rows = [measure(num_images, given.sample) for num_images in given.images]
    print("   images  predicted    actual  ratio  bottleneck", file=sys.stderr)
    for row in rows:
        numbers = f"{row['images']:9} {row['predicted_s']:9.1f}s {row['actual_s']:8.1f}s {row['ratio']:6.2f}"
        print(f"{numbers}  {row['bottleneck']}", file=sys.stderr)
    targets = {f"error_of_{row['images']}": at_most(round(abs(row["ratio"] - 1), 3), TARGET) for row in rows}
    print(last_line("planning", targets, sizes=rows))


if __name__ == "__main__":
    main()
