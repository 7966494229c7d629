"""What does one card do with CLIP ViT-L/14 and LLaMA-3-8B: how far from its memory, and from transformers' `generate`?

    python -m tests.bench.device [--rounds 3] [--only step] [--price 2.5]
    python -m tests.bench.device --tiny --device cpu      # the same paths at toy size: says nothing of a card

Random weights, made on the device, through the classes that a user's weights take. Caption lengths are forced to the
same log-normal spread on both sides, as in `tests.bench.decoding`; both sides take turns in every round. The floor of a
step is the bytes it must read, weights and live keys and values, over the bandwidth that a plain copy reaches here.
Eager steps stand beside recorded ones. A table for people, and one JSON object as the last line.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from captioner.config import DecodingConfig
from captioner.decoding import Engine, Request
from captioner.model.recording import recorder_for
from captioner.model.module import allocate
from captioner.model.projector import ProjectorConfig, build_projector
from tests.bench.decoding import EndAt, caption_lengths

SHORT, LONG = (14, 56), (60, 240)
BATCHES_PER_SLOT = 4
ENCODE_ROWS = 64
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
CLIP_VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "image_size": 224,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to caption, timed against `generate` with the same options."""

    name: str
    slots: int
    lengths: tuple[int, int] = SHORT
    shared_len: int = 1
    options: dict[str, Any]


CASES = (
    *(Case(name=f"greedy_mean14_{slots}", slots=slots, options={}) for slots in (64, 128, 256)),
    *(Case(name=f"greedy_mean60_{slots}", slots=slots, lengths=LONG, options={}) for slots in (64, 128, 256)),
    Case(name="greedy_mean14_128_prompt9", slots=128, shared_len=9, options={}),
    Case(name="beam4_mean14_128", slots=128, options={"num_beams": 4}),
    Case(name="sampling_mean14_128", slots=128, options={"do_sample": True}),
)


class Rig:
    """The models on the device and how their work is timed."""

    def __init__(self, device: torch.device, *, is_tiny: bool) -> None:
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        vocabulary = {"vocab_size": 512} if is_tiny else {}
        llama = LLAMA_3_8B | (TINY | {"num_key_value_heads": 2} | vocabulary if is_tiny else {})
        self.llama = self._random(LlamaForCausalLM, LlamaConfig(**llama, eos_token_id=None))
        self.tower = self._random(CLIPVisionModel, CLIPVisionConfig(**CLIP_VIT_L_14 | (TINY if is_tiny else {})))
        width = ProjectorConfig(
            kind="linear", num_features=self.tower.config.hidden_size, width=self.llama.config.hidden_size
        )
        self.projector = build_projector(width).to(device, self.dtype)

    @torch.no_grad()
    def _random(self, model_class: type[PreTrainedModel], config: Any) -> Any:
        model = allocate(model_class, config, dtype=self.dtype, device=self.device)
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        return model.eval()

    def seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes."""
        source = torch.empty((1 << 30) if self.device.type == "cuda" else (1 << 26), dtype=torch.uint8).to(self.device)
        target = torch.empty_like(source)
        return 2 * len(source) / min(self.seconds(lambda: target.copy_(source)) for _ in range(9))

    @torch.inference_mode()
    def embeds(self, pixels: Tensor) -> Tensor:
        """float[B, 1, D] from uint8[B, 3, S, S]: copy, normalisation, CLIP and projection."""
        scaled = pixels.to(self.device, non_blocking=True).to(self.dtype).div_(127.5).sub_(1.0)
        return self.projector(self.tower(pixel_values=scaled).pooler_output)  # type: ignore[no-any-return]


class Workload:
    """The images of one case and the two ways to caption them."""

    def __init__(self, rig: Rig, case: Case, *, is_recorded: bool) -> None:
        self.rig, self.case = rig, case
        self.decoding = DecodingConfig(max_new_tokens=case.lengths[1], **case.options)
        self.batch = case.slots // self.decoding.num_beams
        number, width = self.batch * BATCHES_PER_SLOT, rig.llama.config.hidden_size
        self.shared = torch.randn(case.shared_len, width).to(rig.device, rig.dtype)
        self.images = torch.randn(number, 1, width).to(rig.device, rig.dtype)
        self.lengths = caption_lengths(number, *case.lengths)
        self.engine = Engine(
            rig.llama,
            decoding=self.decoding,
            eos_token_ids=(),
            shared_prefix=self.shared,
            prefix_len=1,
            slots=case.slots,
            recorder=recorder_for(rig.device) if is_recorded else None,
        )

    def requests(self, images: Iterator[Tensor]) -> Iterator[Request]:
        for i, (image, length) in enumerate(zip(images, self.lengths.tolist(), strict=True)):
            yield Request(i, image, seed=i, max_new_tokens=length)

    def ours(self) -> int:
        return sum(1 for _ in self.engine.generate(self.requests(iter(self.images))))

    def from_pixels(self, pixels: Tensor) -> int:
        """Caption images that wait as pixels in memory: each batch is encoded when its turn comes."""

        def prefixes() -> Iterator[Tensor]:
            for start in range(0, len(self.images), ENCODE_ROWS):
                yield from self.rig.embeds(pixels[: min(ENCODE_ROWS, len(self.images) - start)])

        return sum(1 for _ in self.engine.generate(self.requests(prefixes())))

    def generate(self) -> None:
        for start in range(0, len(self.images), self.batch):
            images, lengths = self.images[start : start + self.batch], self.lengths[start : start + self.batch]
            embeds = torch.cat([self.shared.expand(len(images), -1, -1), images], 1)
            self.rig.llama.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=self.rig.device),
                max_new_tokens=int(lengths.max()),
                stopping_criteria=[EndAt(lengths.to(self.rig.device))],
                do_sample=self.decoding.do_sample,
                num_beams=self.decoding.num_beams,
                pad_token_id=0,
                eos_token_id=None,
            )


def step_figures(rig: Rig, slots: int, *, is_recorded: bool) -> dict[str, float]:
    """Milliseconds a step at mid caption with all slots taken, and its floor."""
    work = Workload(rig, Case(name="step", slots=slots, options={}), is_recorded=is_recorded)
    for i in range(slots):
        work.engine.admit(Request(i, work.images[i], max_new_tokens=24))
    for _ in range(4):
        work.engine.step()
    seconds = statistics.median(rig.seconds(work.engine.step) for _ in range(16))
    config = rig.llama.config
    weights = sum(
        p.numel() * p.element_size() for name, p in rig.llama.named_parameters() if "embed_tokens" not in name
    )
    head = config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 12 * slots * rig.dtype.itemsize
    floor = (weights + kv) / rig.bandwidth()
    return {"ms": seconds * 1e3, "floor_ms": floor * 1e3, "bandwidth_share": floor / seconds}


def clip_figures(rig: Rig) -> dict[str, float]:
    pixels = random_pixels(rig)
    seconds = statistics.median(rig.seconds(lambda: rig.embeds(pixels)) for _ in range(9))
    return {"images_per_s": len(pixels) / seconds}


def random_pixels(rig: Rig) -> Tensor:
    pixels = torch.randint(0, 256, (ENCODE_ROWS, 3, 224, 224), dtype=torch.uint8)
    return pixels.pin_memory() if rig.device.type == "cuda" else pixels


def case_figures(rig: Rig, case: Case, *, rounds: int, price: float, is_recorded: bool) -> dict[str, float]:
    """Captions a second of the engine and of `generate`, taking turns, and of the engine from pixels in memory."""
    work, pixels = Workload(rig, case, is_recorded=is_recorded), random_pixels(rig)
    ways = {"ours": work.ours, "generate": work.generate, "from_pixels": lambda: work.from_pixels(pixels)}
    for way in ways.values():
        way()
    seconds = {name: statistics.median(times) for name, times in _in_turn(rig, ways, rounds).items()}
    number = len(work.images)
    return {
        "captions_per_s": number / seconds["ours"],
        "generate_per_s": number / seconds["generate"],
        "ratio": seconds["generate"] / seconds["ours"],
        "images_per_s_from_pixels": number / seconds["from_pixels"],
        "dollars_per_million": price / 3600 * seconds["from_pixels"] / number * 1e6,
    }


def _in_turn(rig: Rig, ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(rig.seconds(way))
    return seconds


def measure(device: str, *, is_tiny: bool, rounds: int, price: float, only: str) -> dict[str, dict[str, float]]:
    """Return the figures of every part whose name contains `only`, printing each as it is known."""
    rig = Rig(torch.device(device), is_tiny=is_tiny)
    is_recorded = rig.device.type == "cuda"
    parts: dict[str, Callable[[], dict[str, float]]] = {"clip": lambda: clip_figures(rig)}
    for slots in (64, 128, 256):
        parts[f"step_eager_{slots}"] = lambda slots=slots: step_figures(rig, slots, is_recorded=False)
        if is_recorded:
            parts[f"step_recorded_{slots}"] = lambda slots=slots: step_figures(rig, slots, is_recorded=True)
    for case in CASES:
        parts[case.name] = lambda case=case: case_figures(
            rig, case, rounds=rounds, price=price, is_recorded=is_recorded
        )
    figures = {}
    for name, part in parts.items():
        if only in name:
            figures[name] = {key: round(value, 4) for key, value in part().items()}
            print(f"{name:28}", "  ".join(f"{key} {value:g}" for key, value in figures[name].items()), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy widths, to run the paths where there is no card")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--price", type=float, default=2.5, help="dollars an hour that the card costs")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    figures = measure(args.device, is_tiny=args.tiny, rounds=args.rounds, price=args.price, only=args.only)
    print(json.dumps({"benchmark": "device", "device": name, "is_tiny": args.tiny, "figures": figures}))


if __name__ == "__main__":
    main()
