"""What do kept features save a fit, and how much of a step is neither the model's forward nor its backward?

    python -m tests.bench.fitting [--rounds 7] [--steps 6] [--batch-size 32] [--threads 2]

A random CLIP tower and LLaMA whose costs stand to each other as those of ViT-L/14 at 224 pixels and LLaMA-3-8B nearly
do for captions of 16 tokens: both ratios are counted and printed. The fit from kept features and one that encodes the
images of every batch again take turns in each round, as do a whole step - choosing and gathering examples, exchange,
clipping, AdamW, learning rate - and its forward and backward alone. Decoding images is left out: it would flatter.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from captioner.config import TrainingConfig
from captioner.model.bundle import load, save_bundle
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.training.fit.batches import TokenizedSplit, epoch_batches, share
from captioner.training.fit.projector import ProjectorFit, end_token_id
from captioner.training.fit.worker_group import WorkerGroup
from tests.bench.report import at_most, last_line
from tests.unit.model import tiny_models

IMAGE_SIZE, CLIP_WIDTH, LLAMA_WIDTH, CAPTION_TOKENS = 64, 256, 512, 16
NUM_IMAGES, CAPTIONS_AN_IMAGE = 512, 5
REAL_RATIO = (257 * 2 * 303e6) / ((CAPTION_TOKENS + 2) * 4 * 8.03e9)
"""ViT-L/14's forward over LLaMA-3-8B's forward and backward to its inputs: parameters times tokens."""


def model(folder: Path):
    clip = tiny_models.clip_config(
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
    )
    tiny_models.save_clip(folder / "clip", clip)
    tiny_models.write_json(folder / "clip" / "preprocessor_config.json", tiny_models.preprocessor_config(IMAGE_SIZE))
    llama = tiny_models.llama_config(
        hidden_size=LLAMA_WIDTH,
        intermediate_size=3 * LLAMA_WIDTH,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4096,
        initializer_range=0.02,
    )
    tiny_models.save_llama(folder / "llama", llama)
    config = ProjectorConfig(kind="linear", num_features=CLIP_WIDTH, width=LLAMA_WIDTH)
    save_bundle(folder, build_projector(config), config, clip="clip", llama="llama")
    return load(str(folder), device="cpu")


def examples(loaded) -> TokenizedSplit:
    lots = np.random.default_rng(0)
    lengths = np.clip(lots.normal(CAPTION_TOKENS - 1, 3, NUM_IMAGES * CAPTIONS_AN_IMAGE).round().astype(int), 5, 40)
    letters = ["".join(lots.choice(list("abcdefgh"), length)) for length in lengths]
    captions = [letters[i : i + CAPTIONS_AN_IMAGE] for i in range(0, len(letters), CAPTIONS_AN_IMAGE)]
    features = lots.normal(size=(NUM_IMAGES, CLIP_WIDTH)).astype(np.float16)
    return TokenizedSplit.tokenize(
        features,
        captions,
        loaded.tokenizer,
        end_token_id=end_token_id(loaded.tokenizer, loaded.template.text, loaded.eos_token_ids),
        max_tokens=64,
    )


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def flops(work: Callable[[], None]) -> float:
    with FlopCounterMode(display=False) as counted:
        work()
    return float(counted.get_total_flops())


class Bench:
    """One fit, and the ways to take its steps."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.loaded = model(folder)
        self.examples = examples(self.loaded)
        config = TrainingConfig(batch_size=batch_size)
        self.fit = ProjectorFit(self.loaded, config, num_steps=10_000, group=WorkerGroup())
        lots = np.random.default_rng(1)
        shape = (NUM_IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE)
        self.pixels = torch.from_numpy(lots.integers(0, 256, shape, dtype=np.uint8))
        self.order = epoch_batches(self.examples.lengths, batch_size, seed=0, epoch=0)
        self.place = 0

    def rows(self) -> np.ndarray:
        self.place = (self.place + 1) % len(self.order)
        return self.order[self.place]

    def cached(self, rows: np.ndarray) -> None:
        [part] = share(rows, rank=0, size=1, num_parts=1)
        self.fit.step([self.examples.batch(part)], step=100)

    def encoded_again(self, rows: np.ndarray) -> None:
        images = self.examples.image[rows]
        self.examples.images[images] = self.loaded.features(self.pixels[images]).half().numpy()
        self.cached(rows)

    def model_alone(self, batch) -> None:
        self.fit.loss_sum(batch).backward()
        self.fit.projector.zero_grad(set_to_none=True)

    def flop_ratio(self, rows: np.ndarray) -> float:
        batch = self.examples.batch(rows)
        images = self.pixels[self.examples.image[rows]]
        return flops(lambda: self.loaded.features(images)) / flops(lambda: self.model_alone(batch))

    def round(self, num_steps: int) -> tuple[float, float, float]:
        """Seconds of the same steps: from kept features, encoded again, and forward and backward alone."""
        rows = [self.rows() for _ in range(num_steps)]
        batches = [self.examples.batch(part) for part in rows]
        times = [0.0, 0.0, 0.0]
        for step, (part, batch) in enumerate(zip(rows, batches, strict=True)):
            works = (partial(self.cached, part), partial(self.encoded_again, part), partial(self.model_alone, batch))
            for turn in range(3):
                which = (step + turn) % 3  # none of them always comes first
                times[which] += seconds(works[which])
        return times[0], times[1], times[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.batch_size)
        ratio = bench.flop_ratio(bench.rows())
        bench.round(1)
        rounds = [bench.round(given.steps) for _ in range(given.rounds)]
    num_examples = given.steps * given.batch_size
    gains = [again / cached for cached, again, _ in rounds]
    outside = [1 - alone / cached for cached, _, alone in rounds]
    result: dict[str, Any] = {
        "cached_examples_per_s": round(num_examples / statistics.median(r[0] for r in rounds), 1),
        "encoded_again_examples_per_s": round(num_examples / statistics.median(r[1] for r in rounds), 1),
        "gain": round(statistics.median(gains), 3),
        "gain_range": [round(min(gains), 3), round(max(gains), 3)],
        "gain_by_flops": round(1 + ratio, 3),
        "gain_by_flops_of_vit_l_and_llama_8b": round(1 + REAL_RATIO, 3),
        "share_outside_the_model": round(statistics.median(outside), 4),
        "share_outside_range": [round(min(outside), 4), round(max(outside), 4)],
        "rounds": given.rounds,
    }
    for name, value in result.items():
        print(f"{name:40} {value}", file=sys.stderr)
    targets = {"share_outside_the_model": at_most(result["share_outside_the_model"], 0.1)}
    print(last_line("fitting", targets, values=result))


if __name__ == "__main__":
    main()
