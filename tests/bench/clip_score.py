"""What does --clip-score cost, and what --rerank clip-score, over the same captions without?

    python -m tests.bench.clip_score [--images 192] [--rounds 7]

The demo model in this process, images decoded beforehand, so that only CLIP, projector and LLaMA run; all four ways
take turns in every round. Wall clock, medians of the ratios of each round. The demo's text tower has two layers beside
the vision tower's four and LLaMA's five; the ratio of a real model is another, so there is no target.
"""

import argparse
import statistics
import sys
from functools import partial

import numpy as np
import torch

from captioner import demo
from captioner.captioning.captioner import Captioner
from captioner.config import DecodingConfig, ImageConfig, ScoringConfig
from captioner.images import Decoded, Decoder, Preprocessing
from tests.bench.report import last_line, take_turns

SEVERAL = DecodingConfig(do_sample=True, num_captions=8)
WAYS = {
    "greedy": (DecodingConfig(), ScoringConfig()),
    "greedy, scored": (DecodingConfig(), ScoringConfig(clip_score=True)),
    "8 drawn": (SEVERAL, ScoringConfig()),
    "8 drawn, reranked": (SEVERAL, ScoringConfig(rerank="clip-score")),
}
PAIRS = {"clip_score_ratio": ("greedy, scored", "greedy"), "rerank_ratio": ("8 drawn, reranked", "8 drawn")}


def pixels_of(captioner: Captioner, count: int) -> torch.Tensor:
    files = sorted(demo.images_path().iterdir())
    with Decoder(Preprocessing.from_config(captioner.model.preprocessing), ImageConfig()) as decoder:
        found = [decoder.decode(path.read_bytes()) for path in files]
    pixels = np.stack([one.pixels for one in found if isinstance(one, Decoded)])
    return torch.from_numpy(pixels[np.arange(count) % len(pixels)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    captioners = {
        name: Captioner.from_bundle("demo", decoding, scoring=scoring) for name, (decoding, scoring) in WAYS.items()
    }
    pixels = pixels_of(captioners["greedy"], options.images)
    ids = [str(number) for number in range(len(pixels))]
    ways = {name: partial(captioner.caption_pixels, pixels, ids) for name, captioner in captioners.items()}
    seconds = take_turns(ways, options.rounds)
    for captioner in captioners.values():
        captioner.close()
    for name, times in seconds.items():
        rate, spread = len(pixels) / statistics.median(times), (max(times) - min(times)) / statistics.median(times)
        print(f"{name:18} {rate:8.1f} images/s, spread {spread:.0%}")
    ratios = {
        label: statistics.median(one / other for one, other in zip(seconds[more], seconds[less], strict=True))
        for label, (more, less) in PAIRS.items()
    }
    print(last_line("clip_score", {}, images=len(pixels), values=ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
