"""What does one card do with CLIP ViT-L/14 and LLaMA-3-8B: how far from its memory, and from transformers' `generate`?

    python -m tests.bench.device [--rounds 3] [--only step,pixels] [--price 2.5] [--seconds 500] [--out figures.json]
    python -m tests.bench.device --tiny --device cpu      # the same paths at toy size: says nothing of a card

Random weights, made on the device, through the classes that a user's weights take. Caption lengths are forced to the
same log-normal spread on both sides, as in `tests.bench.decoding`; both sides take turns in every round, in reversed
order in every other one, and each round's ratio is taken. The floor of a step is the bytes it must read, weights and
live keys and values, over the bandwidth that a plain copy reaches here. Eager steps stand beside recorded ones. A table
for people, and one JSON object as the last line; `--out` has it after each part, should a later one fail.

A part that fails is reported with its error and the next one begins; `--seconds` begins none after so long.
"""

import argparse
import gc
import json
import math
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.bench.device.parts import TARGETS, Figures, parts
from tests.bench.device.rig import Rig
from tests.bench.report import at_least, at_most


def measure(rig: Rig, only: str = "", out: Path | None = None, seconds: float = math.inf) -> dict[str, Any]:
    """Return the report of every part whose name begins with one of `only`, printing each as it is known."""
    report = {"benchmark": "device", **machine(rig), "parts": {}, "targets": {}}
    start = time.monotonic()
    for name, part in parts(rig).items():
        if name.startswith(tuple(only.split(","))):
            is_late = time.monotonic() - start > seconds
            report["parts"][name] = found = {"left_out": True} if is_late else _timed(part)
            report["targets"] |= _targets(name, found)
            print(f"{name:28}", "  ".join(f"{key} {_short(value)}" for key, value in found.items()), flush=True)
            if out:
                out.write_text(json.dumps(report) + "\n")
    return report


def _timed(part: Callable[[], Figures]) -> Figures:
    """Return what a part found, or its error, and the seconds that it took."""
    start = time.monotonic()
    try:
        found = part()
    except Exception as error:  # what it is does not matter: the other parts' figures do
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:500]}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found | {"took_s": time.monotonic() - start}


def machine(rig: Rig) -> dict[str, Any]:
    is_cuda = rig.device.type == "cuda"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(rig.device) if is_cuda else "cpu",
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip() if is_cuda else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "is_tiny": rig.is_tiny,
        "dollars_an_hour": rig.price,
        "rounds": rig.rounds,
    }


def _targets(name: str, figures: Figures) -> dict[str, Any]:
    """Return the targets of a part's figures, each by the names of part and figure."""
    return {
        f"{part}.{key}": at_least(figures[key], target) if target > 0 else at_most(figures[key], -target)
        for (part, key), target in TARGETS.items()
        if part == name and key in figures
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy widths, to run the paths where there is no card")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--price", type=float, default=2.5, help="dollars an hour that the card costs")
    parser.add_argument("--only", default="", help="parts whose name begins with one of these, with commas between")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no part after so long")
    parser.add_argument("--out", type=Path, help="file to keep the report in, written again after each part")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rig = Rig(torch.device(args.device), is_tiny=args.tiny, rounds=args.rounds, price=args.price)
    report = measure(rig, args.only, args.out, args.seconds)
    print(json.dumps(report))
    sys.exit(any("error" in found for found in report["parts"].values()))


if __name__ == "__main__":
    main()
