"""How much of a card's time does the host's side of a model worker leave unused?

    python -m tests.bench.host [--images 8192] [--rounds 3] [--step-ms 9.2] [--clip 2060]

A model worker's captioner as it is, its engine's bookkeeping, threads and tokenizer among it, around a simulated card:
CLIP and a step of the engine take what an H100 takes for them, and both at once as long as one after the other. A
caption has 14 tokens on average. The bound is what the card does if it never waits and every slot is always full. Calls
of 256 images each, as Ray makes them: 4 and 8 at once take turns.
"""

import argparse
import statistics
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from captioner.captioning.captioner import Captioner
from captioner.config import DecodingConfig
from captioner.decoding.step import StepShape
from captioner.model.bundle import load
from tests.bench.decoding import SHORT, caption_lengths
from tests.bench.device.parts import end_after
from tests.bench.report import at_least, last_line

SLOTS, BLOCK, ENCODED_AT_ONCE, SIDE = 256, 256, 64, 224
TARGETS = {4: 0.75, 8: 0.85}
"""Share of the bound to reach with so many calls at once, as on a CPU and as on a GPU."""

WAYS = tuple(TARGETS)


class Card:
    """Does the work of several threads at once, each as if it had an equal share of the card."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: dict[threading.Event, float] = {}
        threading.Thread(target=self._serve, daemon=True).start()

    def begin(self, seconds: float) -> threading.Event:
        """Begin that much work; return what is set when it is done."""
        done = threading.Event()
        with self._changed:
            self._left[done] = seconds
            self._changed.notify()
        return done

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._left)
                sharing = list(self._left)
                next_end = min(self._left.values()) * len(sharing)
            start = time.perf_counter()
            time.sleep(min(next_end, 1e-3))
            each = (time.perf_counter() - start) / len(sharing)
            with self._changed:
                for done in sharing:
                    self._left[done] -= each
                    if self._left[done] < 2e-5:  # less than a sleep can be short
                        del self._left[done]
                        done.set()


class Chosen:
    """What a step has chosen, on the card: the host waits for it when it copies it."""

    def __init__(self, simulated: "SimulatedCaptioner", done: threading.Event) -> None:
        self._simulated, self._done = simulated, done

    def cpu(self) -> torch.Tensor:
        self._done.wait()
        self._simulated.step_ended = time.perf_counter()
        return self._simulated.chosen


class SimulatedCaptioner:
    """A captioner whose device is a Card."""

    def __init__(self, step_s: float, encode_s: float, num_images: int) -> None:
        self._step_s, self._encode_s, self._card = step_s, encode_s, Card()
        self.lengths = caption_lengths(num_images, *SHORT).tolist()
        model = replace(load("demo", device="cpu"), image_size=SIDE)
        with patch.dict("captioner.model.image_encoder.ENCODE_ROWS", cpu=ENCODED_AT_ONCE):
            self.captioner = Captioner(model, DecodingConfig(max_new_tokens=SHORT[1]), slots=str(SLOTS))
        self.chosen = torch.tensor([[300.0, -1.0, 1.0]], dtype=torch.float64).repeat(SLOTS, 1)
        prefixes = torch.zeros(ENCODED_AT_ONCE, 1, model.llama.config.hidden_size)
        self._encoded = prefixes, prefixes.new_empty(ENCODED_AT_ONCE, 0)
        self.gaps: list[float] = []
        self.step_ended: float | None = None
        engine: Any = self.captioner.engine._engine
        engine._is_recorded = True  # all rows in every step, as on a card
        engine._propose = self._step
        encoder: Any = self.captioner.encoder
        encoder._run = self._encode
        end_after(self.captioner, dict(enumerate(self.lengths)))

    def caption(self, num_calls: int) -> float:
        """Return the seconds that all images take with so many calls at once."""
        self.gaps.clear()
        self.step_ended = None
        pixels = torch.zeros(BLOCK, 3, SIDE, SIDE, dtype=torch.uint8)
        names = [str(number) for number in range(len(self.lengths))]
        calls = [names[start : start + BLOCK] for start in range(0, len(names), BLOCK)]
        start = time.perf_counter()
        with ThreadPoolExecutor(num_calls) as pool:
            list(pool.map(lambda ids: self.captioner.caption_pixels(pixels[: len(ids)], ids), calls))
        return time.perf_counter() - start

    def _step(self, _shape: StepShape) -> Chosen:
        if self.step_ended is not None:
            self.gaps.append(time.perf_counter() - self.step_ended)
        return Chosen(self, self._card.begin(self._step_s))

    def _encode(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._card.begin(self._encode_s).wait()
        return self._encoded


def measure(num_images: int, rounds: int, step_s: float, images_per_s: float) -> dict[str, Any]:
    simulated = SimulatedCaptioner(step_s, ENCODED_AT_ONCE / images_per_s, num_images)
    num_tokens = sum(simulated.lengths)
    bound = num_images / (num_images / images_per_s + num_tokens / SLOTS * step_s)
    found: dict[int, list[dict[str, float]]] = {way: [] for way in WAYS}
    simulated.caption(WAYS[0])
    for number in range(rounds):
        for way in WAYS[:: -1 if number % 2 else 1]:
            seconds = simulated.caption(way)
            found[way].append(
                {
                    "images_per_s": num_images / seconds,
                    "share_of_bound": num_images / seconds / bound,
                    "slots_filled": num_tokens / (len(simulated.gaps) + 1) / SLOTS,
                    "host_ms_between_steps": statistics.median(simulated.gaps) * 1e3,
                }
            )
    simulated.captioner.close()
    return {
        "bound_images_per_s": bound,
        **{
            f"calls_{way}": {key: statistics.median(one[key] for one in rows) for key in rows[0]}
            for way, rows in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=9.2, help="a step of 256 slots")
    parser.add_argument("--clip", type=float, default=2060.0, help="images a second that CLIP alone encodes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = measure(args.images, args.rounds, args.step_ms / 1e3, args.clip)
    print(f"bound: {report['bound_images_per_s']:.0f} images/s")
    for way in WAYS:
        print(f"{way} calls:", "  ".join(f"{key} {value:.3g}" for key, value in report[f"calls_{way}"].items()))
    shares = {way: report[f"calls_{way}"]["share_of_bound"] for way in WAYS}
    targets = {f"share_of_bound_calls_{way}": at_least(shares[way], least) for way, least in TARGETS.items()}
    print(last_line("host", targets, images=args.images, rounds=args.rounds, values=report))


if __name__ == "__main__":
    main()
