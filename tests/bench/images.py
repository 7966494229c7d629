"""How much faster than Pillow's plain path is an image decoded, how far off, and what does the child process cost?

    python -m tests.bench.images [--rounds 21]

Plain path: open, convert to RGB, resize the whole picture, crop. Photographs are drawn: coarse to fine random structure
and sensor noise, JPEG quality 88, 4:2:0. CPU time, not wall time, so that neighbours on the machine blur nothing; all
paths take turns within each round. The ceiling beside them is Pillow's JPEG decoding alone, at full size.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from captioner.config import ImageConfig
from captioner.images import Decoded, Decoder, Preprocessing, decode
from tests.bench.blank_decoder import decode_nothing

SIZES = ((640, 480), (1024, 768), (4000, 3000))
CLIP, DEFAULT, FAST = Preprocessing(), ImageConfig(), ImageConfig(fast_decode=True)
SPEED_TARGETS = {(1024, 768, "default"): 1.5, (4000, 3000, "default"): 4.0, (1024, 768, "fast"): 2.5}


def photo(width: int, height: int, seed: int = 0) -> bytes:
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        columns = 2**octave + 1
        rows = max(2, columns * height // width)
        coarse = Image.fromarray(random.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        picture += 0.62**octave * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    picture = (picture - picture.mean()) * (55 / picture.std()) + 118
    picture += random.normal(0, 4, (height, width, 1)) + random.normal(0, 2, (height, width, 3))
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=88, subsampling="4:2:0")
    return buffer.getvalue()


def plain_path(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(picture.size)
    width, height = (224 * side // short for side in picture.size)
    left, top = (width - 224) // 2, (height - 224) // 2
    return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))


def timed(
    paths: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    for path in paths.values():
        path()
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            start = clock()
            path()
            seconds[name].append(clock() - start)
    return seconds


def error(data: bytes, config: ImageConfig) -> tuple[int, float]:
    """Return the greatest and the mean difference to CLIPImageProcessor, in levels of 255."""
    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    theirs = np.asarray(processor(Image.open(io.BytesIO(data)))["pixel_values"][0])
    ours = decode(data, CLIP, config)
    assert isinstance(ours, Decoded)
    difference = np.abs(ours.pixels.astype(int) - theirs.astype(int))
    return int(difference.max()), float(difference.mean())


def compare_speed(rounds: int) -> dict[str, float]:
    heads = f"{'plain':>8} {'default':>15} {'fast':>15} {'JPEG alone':>11}"
    print(f"{'images/s and core':16} {'KB':>6} {heads}  greatest and mean error")
    values = {}
    for width, height in SIZES:
        data = photo(width, height)
        paths: dict[str, Callable[[], object]] = {
            "plain": lambda data=data: plain_path(data),
            "default": lambda data=data: decode(data, CLIP, DEFAULT),
            "fast": lambda data=data: decode(data, CLIP, FAST),
            "JPEG alone": lambda data=data: Image.open(io.BytesIO(data)).load(),
        }
        times = timed(paths, rounds if width < 2000 else max(3, rounds // 3))
        seconds = {name: statistics.median(values) for name, values in times.items()}
        ratio = {name: seconds["plain"] / seconds[name] for name in seconds}
        (most, mean), (fast_most, fast_mean) = error(data, DEFAULT), error(data, FAST)
        print(
            f"{width:>6} x {height:<6}{len(data) // 1000:>7} {1 / seconds['plain']:>8.1f}"
            + "".join(f" {1 / seconds[name]:>7.1f} ({ratio[name]:.2f}x)" for name in ("default", "fast"))
            + f" {1 / seconds['JPEG alone']:>11.1f}  default {most}, {mean:.3f}; fast {fast_most}, {fast_mean:.3f}",
            flush=True,
        )
        for name in ("default", "fast"):
            values[f"speedup_{width}x{height}_{name}"] = ratio[name]
        values[f"error_max_{width}x{height}"], values[f"error_mean_{width}x{height}"] = most, mean
    return values


def compare_processes(rounds: int) -> dict[str, float]:
    """Wall time, and the quickest round of each: a wait for a busy core is not what a child process costs."""
    data = photo(1024, 768)
    with Decoder(CLIP, DEFAULT, decode_one=decode_nothing) as way, Decoder(CLIP, DEFAULT, num_processes=2) as pair:
        paths: dict[str, Callable[[], object]] = {
            "here": lambda: decode(data, CLIP, DEFAULT),
            "way": lambda: [way.decode(data) for _ in range(20)],
            "pair": lambda: pair.decode_batch([data] * 16),
        }
        wall = {name: min(times) for name, times in timed(paths, 2 * rounds, time.perf_counter).items()}
    wall["way"] /= 20
    share, gain = wall["way"] / wall["here"], 16 * wall["here"] / wall["pair"]
    print(f"to a child process and back: {wall['way'] * 1000:.3f} ms, {share:.1%} of one 1024x768 image")
    print(f"two child processes together: {16 / wall['pair']:.0f} images/s, {gain:.2f} times this process alone")
    return {"process_overhead_1024x768": share, "speedup_two_processes": gain}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    values = compare_speed(rounds) | compare_processes(rounds)
    targets = {
        f"speedup_{width}x{height}_{name}": {"value": values[f"speedup_{width}x{height}_{name}"], "target": least}
        for (width, height, name), least in SPEED_TARGETS.items()
    }
    met = {name: {**entry, "met": entry["value"] >= entry["target"]} for name, entry in targets.items()}
    limits = {"error_max": 3, "error_mean": 0.3, "process_overhead": 0.03}
    for name, value in values.items():
        for limit, most in limits.items():
            if name.startswith(limit):
                met[name] = {"value": value, "target": most, "met": value <= most}
    print(json.dumps({"bench": "images", "values": values, "targets": met}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
