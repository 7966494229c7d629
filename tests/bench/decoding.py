"""How many captions a second does the engine write, against transformers' `generate` of the same model and batch?

    python -m tests.bench.decoding [--quick] [--rounds 5] [--only greedy] [--cpu-time] [--threads 1]

A random LLaMA of 60M weights (8 layers of 512, 32,000 words, 4 query heads to a key head), the default template (one
shared token, one image token), N = 8 x slots. Caption lengths are forced to the same log-normal spread on both sides:
the engine by each request's limit, `generate` by a stopping criterion a row; it runs each batch to its longest. Both
take turns in every round, and each round's ratio is taken, so that neighbours on the machine blur little; medians.
Where neighbours keep the machine busy, `--cpu-time --threads 1` counts processor seconds instead.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

from captioner.config import DecodingConfig
from captioner.decoding import Engine, Request
from tests.bench.report import last_line, take_turns

USES_CPU_TIME = "--cpu-time" in sys.argv
SHORT, LONG = (14, 56), (60, 240)
"""Mean and greatest number of tokens of a caption."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: this engine and another way to do the same."""

    name: str
    target: float
    dtype: torch.dtype
    slots: int
    lengths: tuple[int, int] = SHORT
    options: dict[str, Any]
    baseline: str = "generate"
    is_at_least: bool = True

    def is_met(self, value: float) -> bool:
        return value >= self.target if self.is_at_least else value <= self.target


BEAM = {"num_beams": 4}
CASES = (
    Case(name="greedy_bf16_64", target=2.5, dtype=torch.bfloat16, slots=64, options={}),
    Case(name="greedy_fp32_32", target=2.2, dtype=torch.float32, slots=32, options={}),
    Case(name="greedy_long_bf16_32", target=2.3, dtype=torch.bfloat16, slots=32, lengths=LONG, options={}),
    Case(name="beam4_fp32_32", target=1.3, dtype=torch.float32, slots=32, options=BEAM),
    Case(
        name="sampling_over_greedy_bf16_64",
        target=1.15,
        dtype=torch.bfloat16,
        slots=64,
        options={"do_sample": True},
        baseline="greedy",
        is_at_least=False,
    ),
    Case(
        name="step_over_matmuls_fp32_32",
        target=1.15,
        dtype=torch.float32,
        slots=32,
        options={},
        baseline="matmuls",
        is_at_least=False,
    ),
)


class EndAt(StoppingCriteria):
    """Ends row i after lengths[i] tokens; with beams, all rows of image i."""

    def __init__(self, lengths: Tensor) -> None:
        self._lengths = lengths

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return input_ids.shape[1] >= self._lengths.repeat_interleave(len(input_ids) // len(self._lengths))


class Workload:
    """The images of one case and the two ways to caption them."""

    def __init__(self, case: Case, rounds_per_slot: int) -> None:
        self.case = case
        self.llama = random_llama(case.dtype)
        self.decoding = DecodingConfig(max_new_tokens=case.lengths[1], **case.options)
        number = case.slots // self.decoding.num_beams * rounds_per_slot
        width = self.llama.config.hidden_size
        self.shared = torch.randn(1, width).to(case.dtype)
        self.images = torch.randn(number, 1, width).to(case.dtype)
        self.lengths = caption_lengths(number, *case.lengths)
        self.engine = self.engine_for(self.decoding)

    def engine_for(self, decoding: DecodingConfig) -> Engine:
        return Engine(
            self.llama,
            decodings=[decoding],
            eos_token_ids=(),
            shared_prefix=self.shared,
            max_prefix_len=1,
            slots=self.case.slots,
        )

    def requests(self) -> Iterator[Request]:
        for i, (image, length) in enumerate(zip(self.images, self.lengths.tolist(), strict=True)):
            yield Request(i, image, seed=i, max_new_tokens=length)

    def ours(self) -> list[tuple[int, ...]]:
        found = {generation.id: generation.best.token_ids for generation in self.engine.generate(self.requests())}
        return [found[i] for i in range(len(self.images))]

    def transformers(self) -> list[tuple[int, ...]]:
        batch = self.case.slots // self.decoding.num_beams
        return [
            tuple(row[:length])
            for start in range(0, len(self.images), batch)
            for row, length in zip(
                self._generate(slice(start, start + batch)), self.lengths[start : start + batch].tolist(), strict=True
            )
        ]

    def _generate(self, part: slice) -> list[list[int]]:
        images = self.images[part]
        embeds = torch.cat([self.shared.expand(len(images), 1, -1), images], 1)
        rows: Tensor = self.llama.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=self.case.lengths[1],
            stopping_criteria=[EndAt(self.lengths[part])],
            do_sample=False,
            num_beams=self.decoding.num_beams,
            pad_token_id=0,
            eos_token_id=None,
        )
        return rows.tolist()


def random_llama(dtype: torch.dtype, context: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def caption_lengths(number: int, mean: int, greatest: int) -> Tensor:
    """Log-normal lengths with sigma 0.6: median 12 and 99th percentile 47 at a mean of 14."""
    spread = torch.randn(number, generator=torch.Generator().manual_seed(3)) * 0.6
    lengths = mean * torch.exp(spread - 0.18)
    return lengths.round().clamp(2, greatest).long()


def clock() -> float:
    return time.process_time() if USES_CPU_TIME else time.perf_counter()


def alternating(paths: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    return take_turns(paths, rounds, clock=clock, has_warm_up=False)  # a case takes minutes


def against_generate(work: Workload, rounds: int) -> tuple[list[float], list[float]]:
    if work.case.dtype == torch.float32:
        assert work.ours() == work.transformers(), "both must write the same captions"
    seconds = alternating({"ours": work.ours, "theirs": work.transformers}, rounds)
    return seconds["ours"], seconds["theirs"]


def against_greedy(work: Workload, rounds: int) -> tuple[list[float], list[float]]:
    drawing, greedy = work.engine, work.engine_for(DecodingConfig(max_new_tokens=work.case.lengths[1]))

    def run(engine: Engine) -> None:
        for _ in engine.generate(work.requests()):
            pass

    seconds = alternating({"ours": lambda: run(drawing), "theirs": lambda: run(greedy)}, rounds)
    return seconds["ours"], seconds["theirs"]


def against_matmuls(work: Workload, rounds: int) -> tuple[list[float], list[float]]:
    """Full steps in mid caption, and the model's own linear layers alone on as many rows."""
    linears = [module for module in work.llama.modules() if isinstance(module, nn.Linear)]
    inputs = {layer.in_features: torch.randn(work.case.slots, layer.in_features) for layer in linears}
    num_steps = 24

    def steps() -> None:
        for i, image in enumerate(work.images[: work.case.slots]):
            work.engine.admit([Request(i, image, max_new_tokens=num_steps)])
        while not work.engine.is_idle:
            work.engine.step()

    @torch.inference_mode()
    def matmuls() -> None:
        for _ in range(num_steps):
            for layer in linears:
                layer(inputs[layer.in_features])

    seconds = alternating({"ours": steps, "theirs": matmuls}, rounds * 2)
    return [s / num_steps for s in seconds["ours"]], [s / num_steps for s in seconds["theirs"]]


COMPARE = {"generate": against_generate, "greedy": against_greedy, "matmuls": against_matmuls}


def peak_flops(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square product that is as large as products get here."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    seconds = alternating({"product": lambda: a @ b}, 9)["product"]
    return 2 * 2048**3 / min(seconds)


def measure(case: Case, *, rounds: int, rounds_per_slot: int) -> dict[str, Any]:
    work = Workload(case, rounds_per_slot)
    ours, theirs = COMPARE[case.baseline](work, rounds)
    ratios = [b / a if case.is_at_least else a / b for a, b in zip(ours, theirs, strict=True)]
    value = statistics.median(ratios)
    weights = sum(layer.weight.numel() for layer in work.llama.modules() if isinstance(layer, nn.Linear))
    tokens = work.case.slots if case.baseline == "matmuls" else int(work.lengths.sum()) * work.decoding.num_beams
    return {
        "value": round(value, 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "target": case.target,
        "met": case.is_met(value),
        "seconds": round(statistics.median(ours), 4),
        "baseline_seconds": round(statistics.median(theirs), 4),
        "tokens_per_s": round(tokens / statistics.median(ours)),
        "gemm_share": round(2 * weights * tokens / statistics.median(ours) / peak_flops(case.dtype), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of a quarter of the images")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, not wall time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    results = {}
    print(f"{'case':32} {'ours s':>9} {'other s':>9} {'ratio':>7} {'spread':>14} {'target':>8} {'GEMM':>6}  met")
    for case in CASES:
        if args.only not in case.name:
            continue
        found = measure(case, rounds=1 if args.quick else args.rounds, rounds_per_slot=2 if args.quick else 8)
        results[case.name] = found
        low, high = found["spread"]
        sign = ">=" if case.is_at_least else "<="
        print(
            f"{case.name:32} {found['seconds']:9.4f} {found['baseline_seconds']:9.4f} {found['value']:7.2f} "
            f"{low:6.2f}-{high:6.2f} {sign:>4}{case.target:4.2f} {found['gemm_share']:6.0%}  {found['met']}",
            flush=True,
        )
    print(last_line("decoding", results, threads=args.threads, cpu_time=args.cpu_time))


if __name__ == "__main__":
    main()
