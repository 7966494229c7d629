"""How much faster than Pillow's plain path is an image decoded, how far off, and what does the child process cost?

    python -m tests.bench.images [--rounds 21] [--photographs FOLDER]

Plain path: open, convert to RGB, resize the whole image, crop. The photographs are drawn so that they behave like those
of cameras (tests/bench/photographs.py). CPU time, so that neighbours on the machine blur little, and wall time; all
paths take turns within each round, the quickest round counts, and the process has the environment of a decoding child.
The ceiling beside them is Pillow's JPEG decoding alone, at full size. FOLDER has real photographs, such as the six of
512x600 to 1411x1411 that scikit-learn, scikit-image and matplotlib install; they are measured beside.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from captioner.config import ImageConfig
from captioner.images import Decoded, Decoder, Preprocessing, decode
from captioner.images.child import ENVIRONMENT
from captioner.images.reader import jpeg_scale
from captioner.images.square import reduction
from tests.bench.blank_decoder import decode_nothing
from tests.bench.photographs import photograph
from tests.bench.report import at_least, at_most, last_line, take_turns

SIZES = ((640, 480), (1024, 768), (1600, 1200), (2048, 1536), (4032, 3024))
CLIP, DEFAULT, FAST = Preprocessing(), ImageConfig(), ImageConfig(fast_decode=True)
SPEED_TARGETS = {
    "speedup_1024x768_default": 1.4,
    "speedup_4032x3024_default": 1.8,
    "speedup_1024x768_fast": 2.4,
    "speedup_4032x3024_fast": 4.0,
}
LIMITS = {"default_error_max": 3, "default_error_mean": 0.3, "process_overhead": 0.03}
"""The most that figures whose names begin so may be."""


def plain_path(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    width, height = (224 * side // short for side in image.size)
    left, top = (width - 224) // 2, (height - 224) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))


def difference(data: bytes, config: ImageConfig) -> npt.NDArray[np.int64]:
    """Return by how much each value is off CLIPImageProcessor's, in levels of 255."""
    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    theirs = np.asarray(processor(Image.open(io.BytesIO(data)))["pixel_values"][0])
    ours = decode(data, CLIP, config)
    assert isinstance(ours, Decoded)
    return np.abs(ours.pixels.astype(np.int64) - theirs.astype(np.int64))


def compare_speed(rounds: int, folder: Path | None) -> dict[str, float]:
    heads = f"{'plain':>8} {'default':>15} {'fast':>15} {'JPEG alone':>11}"
    print(f"{'images/s and core':16} {'KB':>6} {heads}  the same in wall time, default and fast; reduced by")
    values, sizes = {}, []
    for (width, height), photographs in chain(drawn(), real(folder)):
        num_rounds = rounds if width < 2000 else max(5, rounds // 3)
        cpu = seconds_of(photographs, num_rounds, time.process_time)
        wall = seconds_of(photographs, max(3, num_rounds // 3), time.perf_counter)
        num_bytes = sum(map(len, photographs)) // len(photographs)
        factors = (
            reduction((width, height), CLIP.square_view(width, height).box, (CLIP.size, CLIP.size)),
            jpeg_scale((width, height), CLIP),
        )
        print(
            f"{width:>6} x {height:<6}{num_bytes // 1000:>7} {1 / cpu['plain']:>8.1f}"
            + "".join(f" {1 / cpu[name]:>7.1f} ({cpu['plain'] / cpu[name]:.2f}x)" for name in ("default", "fast"))
            + f" {1 / cpu['JPEG alone']:>11.1f} "
            + "".join(f" {wall['plain'] / wall[name]:.2f}x" for name in ("default", "fast"))
            + f"; {factors[0]} and {factors[1]}",
            flush=True,
        )
        for name, config, factor in zip(("default", "fast"), (DEFAULT, FAST), factors, strict=True):
            values[f"speedup_{width}x{height}_{name}"] = cpu["plain"] / cpu[name]
            values[f"is_reduced_{width}x{height}_{name}"] = float(factor > 1)
            values |= errors(photographs, f"{width}x{height}", name, config)
        sizes.append((width, height))
    for name in ("default", "fast"):
        reduced = [values[f"is_reduced_{width}x{height}_{name}"] for width, height in sizes]
        values[f"share_reduced_{name}"] = statistics.mean(reduced)
    return values


def drawn() -> Iterator[tuple[tuple[int, int], list[bytes]]]:
    for width, height in SIZES:
        yield (width, height), [photograph(width, height, seed) for seed in range(4 if width < 4000 else 2)]


def real(folder: Path | None) -> Iterator[tuple[tuple[int, int], list[bytes]]]:
    """Yield the JPEGs of a folder by their size."""
    found: dict[tuple[int, int], list[bytes]] = {}
    for path in sorted(folder.iterdir()) if folder else ():
        found.setdefault(Image.open(path).size, []).append(path.read_bytes())
    yield from sorted(found.items())


def seconds_of(photographs: list[bytes], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the mean over photographs of the quickest round of each path."""
    quickest: dict[str, list[float]] = {}
    for data in photographs:
        paths: dict[str, Callable[[], object]] = {
            "plain": lambda data=data: plain_path(data),
            "default": lambda data=data: decode(data, CLIP, DEFAULT),
            "fast": lambda data=data: decode(data, CLIP, FAST),
            "JPEG alone": lambda data=data: Image.open(io.BytesIO(data)).load(),
        }
        for name, seconds in take_turns(paths, rounds, clock=clock).items():
            quickest.setdefault(name, []).append(min(seconds))
    return {name: statistics.mean(seconds) for name, seconds in quickest.items()}


def errors(photographs: list[bytes], size: str, name: str, config: ImageConfig) -> dict[str, float]:
    """Print how the differences to CLIPImageProcessor are distributed; return the worst greatest and mean one."""
    differences = [difference(data, config) for data in photographs]
    greatest = sorted(int(found.max()) for found in differences)
    means = sorted(float(found.mean()) for found in differences)
    values = np.concatenate([found.ravel() for found in differences])
    within = [f"{np.mean(values <= level):.2%} within {level}" for level in (0, 1, 3)]
    print(
        f"    {name:8} greatest difference median {statistics.median(greatest):g}, worst {greatest[-1]};"
        f" mean {statistics.median(means):.3f}, worst {means[-1]:.3f}; {', '.join(within)};"
        f" p99 {np.percentile(values, 99):g}"
    )
    return {f"{name}_error_max_{size}": greatest[-1], f"{name}_error_mean_{size}": means[-1]}


def compare_processes(rounds: int) -> dict[str, float]:
    """Wall time, and the quickest round of each: a wait for a busy core is not what a child process costs."""
    data = photograph(1024, 768, 0)
    with Decoder(CLIP, DEFAULT, decode_one=decode_nothing) as way, Decoder(CLIP, DEFAULT, num_processes=2) as pair:
        paths: dict[str, Callable[[], object]] = {
            "here": lambda: decode(data, CLIP, DEFAULT),
            "way": lambda: [way.decode(data) for _ in range(20)],
            "pair": lambda: pair.decode_batch([data] * 16),
        }
        wall = {name: min(times) for name, times in take_turns(paths, 2 * rounds).items()}
    wall["way"] /= 20
    share, gain = wall["way"] / wall["here"], 16 * wall["here"] / wall["pair"]
    print(f"to a child process and back: {wall['way'] * 1000:.3f} ms, {share:.1%} of one 1024x768 image")
    print(f"two child processes together: {16 / wall['pair']:.0f} images/s, {gain:.2f} times this process alone")
    return {"process_overhead_1024x768": share, "speedup_two_processes": gain}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--photographs", type=Path)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        command = [sys.executable, "-m", "tests.bench.images", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False).returncode
    values = compare_speed(rounds, arguments.photographs) | compare_processes(rounds)
    targets = {name: at_least(values[name], least) for name, least in SPEED_TARGETS.items()}
    for start, most in LIMITS.items():
        targets |= {name: at_most(value, most) for name, value in values.items() if name.startswith(start)}
    print(last_line("images", targets, values=values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
