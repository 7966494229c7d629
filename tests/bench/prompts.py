"""What does a further prompt cost on images of 576 tokens, beside the first?

    python -m tests.bench.prompts [--images 96] [--rounds 3] [--threads 2] [--cpu-time]

A LLaVA of transformers at toy size, random weights, fp32: a CLIP of one layer over 24 x 24 patches, a LLaMA of 8 layers
of 512 with 2 kv heads and 32,000 words. Its captioner is asked one prompt, two and four about the same images, pixels
in and texts out, with the slots that a job has on a CPU. A prompt is 15 tokens behind the image, an answer 14. The
three take turns in each round; medians of the rounds' ratios. CLIP is so small that the first prompt is the language
model's time over the image.

Memory: keys and values of an image that is being answered, of four prompts over one. Masks: the four prompts, each held
to a pattern, a choice or a JSON schema that no answer comes to the end of; the share of the steps' time that goes into
working the masks out, bringing them to the device, and taking the scores of all other tokens away. `of_decode` is
their share of the steps that compute no prompt. It has no target: such a step of so small a model takes little time.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from captioner.captioning.captioner import Captioner
from captioner.captioning.prompt_engines import PromptEngines
from captioner.config import DecodingConfig
from captioner.model.bundle import load
from captioner.model.caption_model import CaptionModel
from captioner.prompts import Prompt, read_prompts
from tests.bench.report import at_most, last_line, take_turns
from tests.unit.model.tiny_models import edit_json, llama3_tokenizer, preprocessor_config, save_llava, write_json

TOKENS_IN, TOKENS_OUT = 15, 14
SIDE, PATCH, WORDS, SPECIAL = 336, 14, 32_000, 16
FURTHER_PROMPT, MEMORY_OF_FOUR, MASKS_OF_STEPS = 0.10, 1.2, 0.05
HELD = {
    "choice": "choice: ['{0} red', '{0} green', '{0} blue', '{1} red']".format("kilo mega giga " * 4, "tera peta " * 6),
    "regex": "regex: '[a-z ,.]{300,400}'",
    "json": "json_schema: {type: object, additionalProperties: false, required: [tags], properties: {tags: "
    "{type: array, minItems: 30, maxItems: 90, items: {type: string, maxLength: 60}}}}",
}
_SYLLABLES = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]


def spelled(number: int) -> str:
    """A word of one to three syllables, every other one behind a space."""
    word, left = "", number // 2
    while left or not word:
        left, syllable = divmod(left, len(_SYLLABLES))
        word += _SYLLABLES[syllable]
    return word.capitalize() if number % 2 else f"Ġ{word}"


def toy_llava(folder: Path) -> CaptionModel:
    """A LLaVA of 576 image tokens whose masks are as wide as those of a published one."""
    num_words = WORDS - SPECIAL - 2
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    language = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=num_words,
        eos_token_id=num_words + 1,
        pad_token_id=WORDS - 1,
    )
    tokenizer = llama3_tokenizer(num_words=num_words, extra=("<image>", "<pad>"), spelled=spelled)
    save_llava(folder, tokenizer=tokenizer, vision=vision, language=language)
    edit_json(folder / "config.json", image_token_index=WORDS - 2, image_token_id=WORDS - 2)
    edit_json(folder / "generation_config.json", bos_token_id=num_words, eos_token_id=num_words + 1)
    write_json(folder / "preprocessor_config.json", preprocessor_config(SIDE))
    return load(str(folder))


def prompts_of(folder: Path, number: int, held: str = "") -> tuple[Prompt, ...]:
    """So many prompts whose texts part at once, in free text or held to a constraint."""
    lines = [
        f'p{place}: {{text: "<|begin_of_text|>{{image}}{place}{"x" * (TOKENS_IN - 1)}", {held}}}'
        for place in range(number)
    ]
    file = folder / "prompts.yaml"
    file.write_text("\n".join(lines))
    return read_prompts(file, DecodingConfig(max_new_tokens=TOKENS_OUT), frozenset())


def engine_of(captioner: Captioner) -> Any:
    """The one engine of a captioner of prompts, with its private parts."""
    assert isinstance(captioner.engine, PromptEngines)
    [thread] = captioner.engine.threads
    return thread._engine


class Asked:
    """A captioner with some prompts, and the images that it is asked about."""

    def __init__(self, model: CaptionModel, prompts: Sequence[Prompt], pixels: torch.Tensor) -> None:
        self.captioner = Captioner(model, DecodingConfig(max_new_tokens=TOKENS_OUT), prompts=prompts)
        self.pixels = pixels
        [(before, after)] = {tuple(map(len, model.prompt_writer.tokens(one, 0, {})[:2])) for one in prompts}
        assert (before, after, model.num_image_tokens) == (1, TOKENS_IN, 576), (before, after, model.num_image_tokens)

    def __call__(self) -> None:
        number = len(self.pixels)
        ids = [str(image) for image in range(number)]
        rows = self.captioner.answer_pixels(self.pixels, ids, [(SIDE, SIDE)] * number, [{}] * number)
        assert {answer.caption.num_tokens for row in rows for answer in row} == {TOKENS_OUT}

    @property
    def kv_bytes_of_image(self) -> float:
        """Keys and values of an image and its answers."""
        layout, stores = engine_of(self.captioner)._model.layout, engine_of(self.captioner)._model.buffers.stores
        return sum(store.numel() * store.element_size() for store in (stores.prefixes, stores.own)) / layout.num_images


class MaskClock:
    """What the masks of an engine's steps take, by the given clock of the engine's own thread."""

    def __init__(self, engine: Any, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._masks_s = 0.0
        self.steps: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        """Seconds of masks and of all, of each step: with prompt rows, and without."""
        strategy, begin, end = engine._strategy, engine.begin_step, engine.end_step
        strategy.prepare = self._timed(strategy.prepare)
        for method in strategy._methods:
            method.constrained = self._timed(method.constrained)

        def begin_step() -> None:
            self._has_prompts, self._masks_s, self._begun_s = engine._prefill.num_rows > 0, 0.0, -clock()
            begin()
            self._begun_s += clock()

        def end_step() -> Any:
            start = clock()
            found = end()
            self.steps[self._has_prompts].append((self._masks_s, self._begun_s + clock() - start))
            return found

        engine.begin_step, engine.end_step = begin_step, end_step

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = self._clock()
            result = call(*arguments)
            self._masks_s += self._clock() - start
            return result

        return timed

    @property
    def shares(self) -> dict[str, float]:
        """Of all steps, and of those that only decode."""
        ways = {"share": [*self.steps[True], *self.steps[False]], "of_decode": self.steps[False]}
        sums = {name: [sum(column) for column in zip(*steps, strict=True)] for name, steps in ways.items() if steps}
        return {name: round(masks / all_of_it, 4) for name, (masks, all_of_it) in sums.items()}


def measure_prompts(model: CaptionModel, folder: Path, pixels: torch.Tensor, rounds: int, clock: Any) -> dict[str, Any]:
    ways = {number: Asked(model, prompts_of(folder, number), pixels) for number in (1, 2, 4)}
    seconds = take_turns({str(number): asked for number, asked in ways.items()}, rounds, clock=clock)
    pairs = {number: list(zip(seconds["1"], seconds[str(number)], strict=True)) for number in (2, 4)}
    further = {
        number: [(several - one) / one / (number - 1) for one, several in of_rounds]
        for number, of_rounds in pairs.items()
    }
    found = {
        "seconds": {number: round(statistics.median(each), 3) for number, each in seconds.items()},
        "further": {number: round(statistics.median(each), 4) for number, each in further.items()},
        "spread": {number: [round(min(each), 4), round(max(each), 4)] for number, each in further.items()},
        "kv_mb_of_image": {number: round(asked.kv_bytes_of_image / 1e6, 3) for number, asked in ways.items()},
        "slots": {number: asked.captioner.num_slots for number, asked in ways.items()},
    }
    for asked in ways.values():
        asked.captioner.close()
    return found


def measure_masks(model: CaptionModel, folder: Path, pixels: torch.Tensor, clock: Any) -> dict[str, Any]:
    found = {}
    for name, held in HELD.items():
        asked = Asked(model, prompts_of(folder, 4, held), pixels)
        timed = MaskClock(engine_of(asked.captioner), clock)
        asked()
        found[name] = timed.shares
        asked.captioner.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, not wall time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (args.images, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = toy_llava(folder / "llava")
        clock = time.process_time if args.cpu_time else time.perf_counter
        found = measure_prompts(model, folder, pixels, args.rounds, clock)
        print(*(f"{key}: {value}" for key, value in found.items()), sep="\n", flush=True)
        masks = measure_masks(model, folder, pixels, time.thread_time if args.cpu_time else time.perf_counter)
        print(*(f"masks, {key}: {value}" for key, value in masks.items()), sep="\n")
    memory = found["kv_mb_of_image"]
    targets = {
        "further_of_two": at_most(found["further"][2], FURTHER_PROMPT),
        "further_of_four": at_most(found["further"][4], FURTHER_PROMPT),
        "memory_of_four": at_most(round(memory[4] / memory[1], 3), MEMORY_OF_FOUR),
        **{f"masks_{key}": at_most(value["share"], MASKS_OF_STEPS) for key, value in masks.items()},
    }
    figures = {"images": args.images, "threads": args.threads, "cpu_time": args.cpu_time}
    print(last_line("prompts", targets, **figures, values=found, masks=masks))


if __name__ == "__main__":
    main()
