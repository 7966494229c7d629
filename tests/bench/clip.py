"""How much faster is CLIP's tower than transformers', with the activation done as here?

    python -m tests.bench.clip [--rounds 7] [--layers 4] [--device cpu]

ViT-L/14's widths, random weights, 8 images at a time on one thread of a CPU, 64 on a card; both take turns, in reversed
order in every other round, and each round's ratio is taken. The target: not slower than transformers'.
"""

import argparse
import copy
import statistics
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from captioner.model.image_encoder import ENCODE_ROWS
from captioner.model.quick_gelu import fuse_quick_gelu
from tests.bench.device.rig import Rig
from tests.bench.report import at_least, last_line


@torch.inference_mode()
def measure(rig: Rig, dtype: torch.dtype, layers: int) -> dict[str, Any]:
    config = CLIPVisionConfig(**rig.clip_settings | {"num_hidden_layers": layers})
    theirs = rig.random(CLIPVisionModel, config, dtype)
    ours = fuse_quick_gelu(copy.deepcopy(theirs))
    images = torch.randn(ENCODE_ROWS[rig.device.type], 3, config.image_size, config.image_size).to(rig.device, dtype)
    rounds = rig.in_turn({"ours": partial(ours, images), "transformers": partial(theirs, images)})
    ratios = [seconds["transformers"] / seconds["ours"] for seconds in rounds]
    return {"ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)], "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rig = Rig(torch.device(args.device), is_tiny=False, rounds=args.rounds)
    report = {str(dtype)[6:]: measure(rig, dtype, args.layers) for dtype in (torch.float32, torch.bfloat16)}
    for name, found in report.items():
        print(f"{name}: {found['ratio']:.2f}x ({found['spread'][0]:.2f} to {found['spread'][1]:.2f})")
    targets = {f"{name}_ratio": at_least(found["ratio"], 1.0) for name, found in report.items()}
    print(last_line("clip", targets, values=report))


if __name__ == "__main__":
    main()
