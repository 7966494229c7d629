"""What does each rung of a fit cost, how much of a step is not the model, and does it wait for pixels?

    python -m tests.bench.fitting [--rounds 7] [--steps 6] [--batch-size 32] [--threads 2] [--only rungs,pixels]

A random CLIP tower and LLaMA whose costs stand to each other as those of ViT-L/14 at 224 pixels and LLaMA-3-8B nearly
do for captions of 16 tokens: both ratios are counted and printed. `rungs`: in each round a whole step of every rung -
choosing and gathering examples, exchange, clipping, AdamW, learning rate - takes turns with its forward and backward
alone, and the fit from kept features with one that encodes the images of every batch again. Pixels are in memory.

`pixels`: the command fits all patches of photographs of 1024x768, which its stream decodes beside the steps, with a
language model that takes about as long for an example on a core here as LLaMA-3-8B on one H100 at a third of its peak;
the share of the steps' time in which they waited for pixels, without those before the stream had started.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from captioner.config import TrainingConfig
from captioner.model.bundle import load, save_bundle
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.training.fit.batches import Batch, TokenizedSplit, epoch_batches, share
from captioner.training.fit.projector import ProjectorFit, end_token_id
from captioner.training.fit.worker_group import WorkerGroup
from tests.bench.photographs import photograph
from tests.bench.report import at_most, last_line
from tests.unit.model import tiny_models

IMAGE_SIZE, CLIP_WIDTH, LLAMA_WIDTH, CAPTION_TOKENS = 64, 256, 512, 16
NUM_IMAGES, CAPTIONS_AN_IMAGE = 512, 5
REAL_RATIO = (257 * 2 * 303e6) / ((CAPTION_TOKENS + 2) * 4 * 8.03e9)
"""ViT-L/14's forward over LLaMA-3-8B's forward and backward to its inputs: parameters times tokens."""

H100_EXAMPLE_S = (257 * 2 * 303e6 + (256 + CAPTION_TOKENS + 1) * 4 * 8.03e9) / (989e12 / 3)
"""Of an example with all patches, at a third of the peak."""

RUNGS = {
    "linear-1": ("linear", 1),
    "mlp-1": ("pooled_mlp", 1),
    "8 queries": ("query", 8),
    "16 averages": ("average_linear", 16),
    "64 patches": ("patch_linear", 64),
}
"""Name -> kind of projector, image tokens."""

JOBS, DRAWN = Path(__file__).parents[2] / "jobs", 24


def model(folder: Path, kind: str = "linear", num_tokens: int = 1):
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
    shape = {"num_features": CLIP_WIDTH, "width": LLAMA_WIDTH, "num_image_tokens": num_tokens}
    config = ProjectorConfig(kind=kind, **shape)
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

    def __init__(self, folder: Path, batch_size: int, kind: str, num_tokens: int) -> None:
        self.loaded = model(folder, kind, num_tokens)
        self.examples = examples(self.loaded)
        config = TrainingConfig(batch_size=batch_size)
        self.fit = ProjectorFit(self.loaded, config, num_steps=10_000, group=WorkerGroup())
        lots = np.random.default_rng(1)
        shape = (NUM_IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE)
        self.pixels = lots.integers(0, 256, shape, dtype=np.uint8)
        self.order = epoch_batches(self.examples.lengths, batch_size, seed=0, epoch=0)
        self.place = 0

    def rows(self) -> np.ndarray:
        self.place = (self.place + 1) % len(self.order)
        return self.order[self.place]

    def batch(self, rows: np.ndarray) -> Batch:
        """The examples, with pixels where the step reads them."""
        reads_patches = self.loaded.projector_config.reads_patches
        return self.examples.batch(rows, self.pixels[self.examples.image[rows]] if reads_patches else None)

    def step(self, rows: np.ndarray) -> None:
        [part] = share(rows, rank=0, size=1, num_parts=1)
        self.fit.step([self.batch(part)], step=100)

    def encoded_again(self, rows: np.ndarray) -> None:
        images = self.examples.image[rows]
        self.examples.images[images] = self.loaded.features(torch.from_numpy(self.pixels[images])).half().numpy()
        self.step(rows)

    def model_alone(self, batch: Batch) -> None:
        self.fit.loss_sum(batch).backward()
        self.fit.projector.zero_grad(set_to_none=True)

    def flop_ratio(self, rows: np.ndarray) -> float:
        batch = self.batch(rows)
        images = torch.from_numpy(self.pixels[self.examples.image[rows]])
        return flops(lambda: self.loaded.features(images)) / flops(lambda: self.model_alone(batch))

    def round(self, num_steps: int, ways: Mapping[str, Callable[[np.ndarray, Batch], None]]) -> dict[str, float]:
        """Seconds of the same steps in each way."""
        rows = [self.rows() for _ in range(num_steps)]
        batches = [self.batch(part) for part in rows]
        times = dict.fromkeys(ways, 0.0)
        for step, (part, batch) in enumerate(zip(rows, batches, strict=True)):
            for turn in range(len(ways)):
                name = [*ways][(step + turn) % len(ways)]  # none of them always comes first
                times[name] += seconds(partial(ways[name], part, batch))
        return times


def measure_rungs(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Examples a second of each rung and the share of its steps that is not the model; what kept features save."""
    num_examples, rungs = given.steps * given.batch_size, {}
    values: dict[str, Any] = {}
    for name, (kind, num_tokens) in RUNGS.items():
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), given.batch_size, kind, num_tokens)
        ways = {
            "step": lambda rows, _, bench=bench: bench.step(rows),
            "model": lambda _, batch, bench=bench: bench.model_alone(batch),
        }
        if name == "linear-1":
            ways["again"] = lambda rows, _, bench=bench: bench.encoded_again(rows)
            values["gain_by_flops"] = round(1 + bench.flop_ratio(bench.rows()), 3)
        bench.round(1, ways)
        rounds = [bench.round(given.steps, ways) for _ in range(given.rounds)]
        outside = sorted(1 - one["model"] / one["step"] for one in rounds)
        rungs[name] = {
            "examples_per_s": round(num_examples / statistics.median(one["step"] for one in rounds), 1),
            "share_outside_the_model": round(statistics.median(outside), 4),
            "range": [round(outside[0], 4), round(outside[-1], 4)],
        }
        if name == "linear-1":
            gains = sorted(one["again"] / one["step"] for one in rounds)
            values |= {"gain_of_kept_features": round(statistics.median(gains), 3)}
            values |= {"gain_range": [round(gains[0], 3), round(gains[-1], 3)]}
        print(f"{name:14}", "  ".join(f"{key} {value}" for key, value in rungs[name].items()), file=sys.stderr)
    values |= {"gain_by_flops_of_vit_l_and_llama_8b": round(1 + REAL_RATIO, 3), "rungs": rungs}
    most = max(rung["share_outside_the_model"] for rung in rungs.values())
    return values, {"share_outside_the_model": at_most(most, 0.1)}


def measure_pixels(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The share of the steps' time in which a fit on patches waited for pixels."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels = write_photographs(folder, given.photographs)
        clip = tiny_models.clip_config(hidden_size=128, num_attention_heads=2, image_size=224, patch_size=32)
        tiny_models.save_clip(folder / "clip", clip)
        shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
        tiny_models.save_llama(folder / "llama", tiny_models.llama_config(**shape, initializer_range=0.02))
        models = ["--clip", folder / "clip", "--llama", folder / "llama"]
        steps = [
            "--max-steps",
            2 * given.photographs // 32,
            "--batch-size",
            32,
            "--log-every",
            2,
            "--eval-every",
            10_000,
        ]
        scoring = ["--num-measured-images", 8, "--num-scored-images", 0, "--image-features", "patches"]
        job = [sys.executable, JOBS / "fit_projector.py", labels, folder / "out", *models, *steps, *scoring]
        subprocess.run([str(word) for word in job], check=True, stdout=sys.stderr)
        rows = [json.loads(line) for line in (folder / "out" / "_run" / "metrics.jsonl").read_text().splitlines()]
    steady = rows[2:]
    took = sum(64 / row["examples_per_s"] for row in steady)
    waited = sum(row["wait_seconds"] for row in steady) / took
    values = {
        "pixel_examples_per_s": round(64 * len(steady) / took, 1),
        "model_ms_per_example": round(1000 * (1 - waited) * took / 64 / len(steady), 1),
        "ms_per_example_of_llama_8b_on_an_h100": round(1000 * H100_EXAMPLE_S, 1),
        "share_waiting_for_pixels": round(waited, 4),
    }
    print("  ".join(f"{key} {value}" for key, value in values.items()), file=sys.stderr)
    return values, {"share_waiting_for_pixels": at_most(values["share_waiting_for_pixels"], 0.05)}


def write_photographs(folder: Path, number: int) -> Path:
    """Write drawn photographs, a few of them many times, each with a caption, and return their labels."""
    drawn = [photograph(1024, 768, seed) for seed in range(DRAWN)]
    with (folder / "labels.jsonl").open("w") as lines:
        for index in range(number + 8):
            (folder / f"{index}.jpg").write_bytes(drawn[index % DRAWN])
            row = {
                "image": f"{index}.jpg",
                "caption": "leaves on leaves",
                "split": "train" if index < number else "val",
            }
            lines.write(json.dumps(row) + "\n")
    return folder / "labels.jsonl"


PARTS = {"rungs": measure_rungs, "pixels": measure_pixels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--photographs", type=int, default=512)
    parser.add_argument("--only", default=",".join(PARTS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = [PARTS[name](given) for name in given.only.split(",")]
    values = {name: value for part, _ in found for name, value in part.items()}
    targets = {name: target for _, part in found for name, target in part.items()}
    print(last_line("fitting", targets, values={**values, "rounds": given.rounds}))


if __name__ == "__main__":
    main()
