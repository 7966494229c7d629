"""What does one card do with CLIP ViT-L/14 and LLaMA-3-8B: how far from its memory, and from transformers' `generate`?

    python -m tests.bench.device [--rounds 3] [--only step,pixels] [--price 2.5] [--out figures.json]
    python -m tests.bench.device --tiny --device cpu      # the same paths at toy size: says nothing of a card

Random weights, made on the device, through the classes that a user's weights take. Caption lengths are forced to the
same log-normal spread on both sides, as in `tests.bench.decoding`; both sides take turns in every round, in reversed
order in every other one, and each round's ratio is taken. The floor of a step is the bytes it must read, weights and
live keys and values, over the bandwidth that a plain copy reaches here. Eager steps stand beside recorded ones. A table
for people, and one JSON object as the last line; `--out` has it after each part, should a later one fail.

Not tried on a card: joining q, k and v, and gate and up, into one product each, which takes a layer from about 43
kernels to 13; weights in fp8 or int8.
"""

import argparse
import json
import subprocess
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.bench.device.parts import TARGETS, Figures, parts
from tests.bench.device.rig import Rig


def measure(rig: Rig, only: str = "", out: Path | None = None) -> dict[str, Any]:
    """Return the report of every part whose name contains one of `only`, printing each as it is known."""
    report = {"benchmark": "device", **machine(rig), "parts": {}}
    for name, part in parts(rig).items():
        if any(piece in name for piece in only.split(",")):
            report["parts"][name] = found = _judged(name, part())
            print(f"{name:28}", "  ".join(f"{key} {_short(value)}" for key, value in found.items()), flush=True)
            if out:
                out.write_text(json.dumps(report) + "\n")
    return report


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


def _judged(name: str, figures: Figures) -> Figures:
    """Add to a part's figures the target of each that has one, and whether it was met."""
    targets = {key: target for (part, key), target in TARGETS.items() if part == name}
    met = {key: figures[key] >= target if target > 0 else figures[key] <= -target for key, target in targets.items()}
    return figures | ({"targets": {key: abs(target) for key, target in targets.items()}, "met": met} if met else {})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy widths, to run the paths where there is no card")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--price", type=float, default=2.5, help="dollars an hour that the card costs")
    parser.add_argument("--only", default="", help="parts whose name contains one of these, with commas between")
    parser.add_argument("--out", type=Path, help="file to keep the report in, written anew after each part")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rig = Rig(torch.device(args.device), is_tiny=args.tiny, rounds=args.rounds, price=args.price)
    print(json.dumps(measure(rig, args.only, args.out)))


if __name__ == "__main__":
    main()
