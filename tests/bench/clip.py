"""How much faster is CLIP's tower than transformers', with the activation done as here?

    python -m tests.bench.clip [--rounds 7] [--layers 4] [--device cpu]

ViT-L/14's widths, random weights, 8 images at a time on a CPU and 64 on a card; both take turns, in reversed order in
every other round, and each round's ratio is taken. On a CPU in processor time of one thread.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from captioner.model.quick_gelu import fuse_quick_gelu
from tests.bench.device.rig import CLIP_VIT_L_14


@torch.inference_mode()
def measure(dtype: torch.dtype, rounds: int, layers: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    config = CLIPVisionConfig(**CLIP_VIT_L_14 | {"num_hidden_layers": layers})
    theirs = CLIPVisionModel(config).eval().requires_grad_(False).to(device, dtype)
    ours = fuse_quick_gelu(copy.deepcopy(theirs))
    images = torch.randn(8 if device.type == "cpu" else 64, 3, 224, 224).to(device, dtype)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    towers: dict[str, Callable[..., Any]] = {"ours": ours, "transformers": theirs}
    for number in range(rounds + 1):
        for name in list(towers)[:: -1 if number % 2 else 1]:
            start = _clock(device)
            towers[name](pixel_values=images)
            seconds[name].append(_clock(device) - start)
    ratios = [
        theirs_s / ours_s for theirs_s, ours_s in zip(seconds["transformers"][1:], seconds["ours"][1:], strict=True)
    ]
    return {
        "seconds": {name: statistics.median(found[1:]) for name, found in seconds.items()},
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        str(dtype)[6:]: measure(dtype, args.rounds, args.layers, torch.device(args.device))
        for dtype in (torch.float32, torch.bfloat16)
    }
    for name, found in report.items():
        print(f"{name}: {found['ratio']:.2f}x ({found['spread'][0]:.2f} to {found['spread'][1]:.2f})")
    print(json.dumps({"benchmark": "clip", **report}))


if __name__ == "__main__":
    main()
