"""How fast does the engine caption images of many tokens, against transformers with the same model and images?

    python -m tests.bench.prefixes [--images 96] [--rounds 3] [--threads 2] [--only 576] [--cpu-time]

A random LLaMA of 8 layers of 512 with 2 kv heads and 32,000 words, fp32, 16 slots, captions of 28 tokens on average and
64 at most. `generate` runs batches of 16, each to its longest caption. Of a mix of 577 to 2,880 tokens it pads each
batch to the longest; `one by one` prefills each image alone and decodes 16 together. Both sides take turns in each
round; medians of the rounds' ratios. `bare` is the time of the matrix products alone: of each image's rows, and of full
steps of 16 for its captions. Prefixes are drawn, so that nothing is encoded; what remains is told apart by steps.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LlamaForCausalLM

from captioner.config import DecodingConfig
from captioner.decoding import Engine, Request
from tests.bench.decoding import EndAt, caption_lengths, random_llama
from tests.bench.report import at_least, at_most, last_line, take_turns

SLOTS, MEAN, MOST = 16, 28, 64
CASES: dict[str, tuple[int, ...]] = {"1": (1,), "64": (64,), "576": (576,), "mix": (577, 2880, 1464, 2144)}
OVER_GENERATE = {"1": 1.8, "64": 1.42, "576": 1.25, "mix": 2.0}
BARE_576, OVER_ONE_BY_ONE, LONGEST_STEP_S = 1.36, 1.0, 1.1


class Workload:
    """The images of one case and the ways to caption them."""

    def __init__(self, llama: LlamaForCausalLM, lengths: Sequence[int], number: int) -> None:
        generator = torch.Generator().manual_seed(1)
        width = llama.config.hidden_size
        self.llama = llama
        self.shared = llama.get_input_embeddings()(torch.tensor([1])).detach()
        self.images = [torch.randn(lengths[i % len(lengths)], width, generator=generator) * 0.02 for i in range(number)]
        self.limits = caption_lengths(number, MEAN, MOST)
        self.engine = Engine(
            llama,
            decodings=[DecodingConfig(max_new_tokens=MOST)],
            eos_token_ids=(),
            shared_prefix=self.shared,
            max_prefix_len=max(lengths),
            slots=SLOTS,
        )
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        """Seconds of the last run's steps: with prompt rows, and without."""

    def ours(self) -> list[list[int]]:
        requests = iter([Request(i, image, max_new_tokens=limit) for i, (image, limit) in enumerate(self._limited())])
        found: dict[Any, list[int]] = {}
        self.steps = {True: [], False: []}
        engine: Any = self.engine
        request = next(requests, None)
        while request is not None or not engine.is_idle:
            while request is not None and engine.num_free:
                engine.admit([request])
                request = next(requests, None)
            has_prompts, start = engine._prefill.num_rows > 0, time.perf_counter()
            found |= {done.id: list(done.best.token_ids) for done in engine.step()}
            self.steps[has_prompts].append(time.perf_counter() - start)
        return [found[i] for i in range(len(self.images))]

    def generate(self) -> list[list[int]]:
        return self._in_batches(self._generate)

    def one_by_one(self) -> list[list[int]]:
        return self._in_batches(self._prefill_alone)

    def _limited(self) -> list[tuple[Tensor, int]]:
        return list(zip(self.images, self.limits.tolist(), strict=True))

    def _in_batches(self, write: Callable[[list[Tensor], Tensor], Tensor]) -> list[list[int]]:
        rows: list[list[int]] = []
        for start in range(0, len(self.images), SLOTS):
            limits = self.limits[start : start + SLOTS]
            prefixes = [torch.cat([self.shared, image]) for image in self.images[start : start + SLOTS]]
            written = write(prefixes, limits).tolist()
            rows += [row[:limit] for row, limit in zip(written, limits.tolist(), strict=True)]
        return rows

    def _generate(self, prefixes: list[Tensor], limits: Tensor) -> Tensor:
        """Left-padded to the longest."""
        longest = max(map(len, prefixes))
        rows: Tensor = self.llama.generate(
            inputs_embeds=torch.stack([pad(one, (0, 0, longest - len(one), 0)) for one in prefixes]),
            attention_mask=_left_padded(prefixes),
            max_new_tokens=MOST,
            stopping_criteria=[EndAt(limits)],
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return rows

    @torch.inference_mode()
    def _prefill_alone(self, prefixes: list[Tensor], limits: Tensor) -> Tensor:
        llama: Any = self.llama
        longest = max(map(len, prefixes))
        outputs = [llama(inputs_embeds=one[None], use_cache=True, logits_to_keep=1) for one in prefixes]
        caches = [[(layer.keys, layer.values) for layer in output.past_key_values.layers] for output in outputs]
        cache = DynamicCache()
        for layer, parts in enumerate(zip(*caches, strict=True)):
            keys, values = (
                torch.cat([pad(part[kind], (0, 0, longest - part[kind].shape[2], 0)) for part in parts])
                for kind in (0, 1)
            )
            cache.update(keys, values, layer)
        tokens = torch.cat([output.logits[:, -1].argmax(-1) for output in outputs])
        mask, position = _left_padded(prefixes), torch.tensor([len(one) for one in prefixes])
        written = [tokens]
        for _ in range(int(limits.max()) - 1):
            mask = pad(mask, (0, 1), value=1)
            output = llama(
                input_ids=tokens[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache
            )
            tokens, position = output.logits[:, -1].argmax(-1), position + 1
            written.append(tokens)
        return torch.stack(written, 1)

    @torch.inference_mode()
    def bare(self) -> None:
        """The products of all images' rows, and of as many full steps as all captions make."""
        layers = [
            part for layer in self.llama.model.layers for part in layer.modules() if isinstance(part, torch.nn.Linear)
        ]
        num_steps = round(int(self.limits.sum()) / SLOTS)
        step = {width: torch.randn(SLOTS, width) for width in {one.in_features for one in layers}}
        for image in self.images:
            rows = {width: torch.randn(len(image) + 1, width) for width in step}
            for one in layers:
                one(rows[one.in_features])
        hidden = step[self.llama.config.hidden_size]
        for _ in range(num_steps):
            for one in layers:
                one(step[one.in_features])
            for weight in torch.split(self.llama.lm_head.weight, 1000):
                torch.mm(hidden, weight.t())


def _left_padded(prefixes: Sequence[Tensor]) -> Tensor:
    longest = max(map(len, prefixes))
    return torch.stack([pad(torch.ones(len(one), dtype=torch.long), (longest - len(one), 0)) for one in prefixes])


def measure(name: str, number: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    work = Workload(random_llama(torch.float32, context=4096), CASES[name], number)
    ways: dict[str, Callable[[], object]] = {"ours": work.ours, "generate": work.generate, "bare": work.bare}
    if name == "mix":
        ways["one_by_one"] = work.one_by_one
    theirs = work.generate()
    equal = sum(mine == other for mine, other in zip(work.ours(), theirs, strict=True))
    seconds = take_turns(ways, rounds, clock=clock, has_warm_up=False)
    ratios = {
        way: [other / mine for mine, other in zip(seconds["ours"], seconds[way], strict=True)]
        for way in ways
        if way != "ours"
    }
    return {
        "equal": f"{equal}/{number}",
        "seconds": {way: round(statistics.median(each), 3) for way, each in seconds.items()},
        "over": {way: round(statistics.median(each), 3) for way, each in ratios.items()},
        "spread": {way: [round(min(each), 3), round(max(each), 3)] for way, each in ratios.items()},
        "steps_with_prompts_s": round(sum(work.steps[True]), 3),
        "steps_without_s": round(sum(work.steps[False]), 3),
        "longest_step_s": round(max(work.steps[True] + work.steps[False]), 3),
        "num_tokens": int(work.limits.sum()),
    }


def targets_of(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    targets = {
        f"over_generate_{name}": at_least(one["over"]["generate"], OVER_GENERATE[name]) for name, one in found.items()
    }
    if "576" in found:
        targets["over_bare_576"] = at_most(round(1 / found["576"]["over"]["bare"], 3), BARE_576)
    if "mix" in found:
        targets["mix_over_one_by_one"] = at_least(found["mix"]["over"]["one_by_one"], OVER_ONE_BY_ONE)
        targets["longest_step_s"] = at_most(found["mix"]["longest_step_s"], LONGEST_STEP_S)
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=list(CASES), help="one case")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, not wall time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, Any]] = {}
    for name in [args.only] if args.only else list(CASES):
        found[name] = measure(name, args.images, args.rounds, time.process_time if args.cpu_time else time.perf_counter)
        print(f"{name:>4} image tokens:", *(f"{key} {value}" for key, value in found[name].items()), flush=True)
    figures = {"images": args.images, "threads": args.threads, "cpu_time": args.cpu_time, "values": found}
    print(last_line("prefixes", targets_of(found), **figures))


if __name__ == "__main__":
    main()
