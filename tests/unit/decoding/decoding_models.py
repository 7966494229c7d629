"""Small random LLaMAs, image prefixes, and the captions that the engine and transformers give them."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from captioner.config import DecodingConfig
from captioner.decoding import Engine, Fork, Generation, IsStopped, Request
from captioner.decoding.cuda.fused_llama import FusedLlama
from captioner.decoding.cuda.operations import PlainOperations
from captioner.decoding.layout import SlotLayout
from captioner.decoding.sequences import StopConditions
from captioner.decoding.step import SlotModel
from captioner.decoding.strategy import BeamStrategy, Strategy, TokenStrategy

EOS = (3, 17, 45, 99)


def tiny_llama(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random model with captions of many lengths: four of its 160 words are end tokens."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": EOS[0],
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def random_prefixes(llama: LlamaForCausalLM, number: int, length: int, *, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(number, length, llama.config.hidden_size, generator=generator) * 0.5)


def engine_of(llama: LlamaForCausalLM, decoding: DecodingConfig, **changes: Any) -> Engine:
    settings: dict[str, Any] = {"eos_token_ids": EOS, "max_prefix_len": 1, "slots": 8}
    settings |= {"shared_prefix": random_prefixes(llama, 1, 3, seed=2)[0], "decodings": [decoding]}
    return Engine(llama, **(settings | changes))


def strategy_of(
    llama: LlamaForCausalLM, decoding: DecodingConfig, *, slots: int = 16, **lengths: int
) -> tuple[SlotModel, Strategy]:
    """The parts of an engine that work on the device and can be recorded, after a shared prefix of three tokens."""
    layout = SlotLayout.of(slots, decoding, shared_len=3, blocks=FusedLlama.blocks, **lengths)
    model = SlotModel(llama, layout, FusedLlama(llama, PlainOperations()))
    make = BeamStrategy if decoding.num_beams > 1 else TokenStrategy
    eos = torch.tensor(EOS, device=llama.device)
    return model, make(model, [decoding], eos, StopConditions(EOS))


def captions(
    llama: LlamaForCausalLM,
    images: Sequence[torch.Tensor],
    decoding: DecodingConfig,
    *,
    is_stopped: IsStopped | None = None,
    **changes: Any,
) -> list[Generation]:
    """The engine's captions, in the order of the images."""
    engine = engine_of(llama, decoding, **({"max_prefix_len": max(map(len, images))} | changes))
    forks = (Fork(is_stopped=is_stopped),)
    done = engine.generate(Request(i, image, seed=i, forks=forks) for i, image in enumerate(images))
    return sorted(done, key=lambda generation: generation.id)


def token_ids(generations: Sequence[Generation]) -> list[list[tuple[int, ...]]]:
    return [[hypothesis.token_ids for hypothesis in generation.hypotheses] for generation in generations]


def assert_same_or_tied(
    llama: LlamaForCausalLM,
    prefixes: Sequence[torch.Tensor],
    ours: Sequence[Generation],
    theirs: Sequence[Sequence[tuple[int, ...]]],
    *,
    eos_token_ids: Sequence[int] = EOS,
    repetition_penalty: float = 1.0,
) -> None:
    """Hold greedy captions equal; two may part only at a tie that float32 cannot see, and no more than one in fifty.

    prefixes: float[S + P, D], all that the model reads before each caption."""
    pairs = [(mine[0], other[0]) for mine, other in zip(token_ids(ours), theirs, strict=True)]
    parted = [place for place, (mine, other) in enumerate(pairs) if mine != other]
    assert len(parted) <= len(pairs) // 50
    for place in parted:
        gap = _gap_where_they_part(llama, prefixes[place], *pairs[place], eos_token_ids, repetition_penalty)
        assert gap < 1e-5, f"caption {place}: {pairs[place]} part where the logits are {gap} apart"


def _gap_where_they_part(
    llama: LlamaForCausalLM,
    prefix: torch.Tensor,
    mine: tuple[int, ...],
    other: tuple[int, ...],
    eos: Sequence[int],
    penalty: float,
) -> float:
    """The distance of the two choices' logits in float64, at the first token where the captions differ."""
    common = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    exact = copy.deepcopy(llama).double()
    written = torch.tensor(mine[:common], dtype=torch.long)
    embeds = torch.cat([prefix.double(), exact.get_input_embeddings()(written)])
    with torch.no_grad():
        logits = exact(inputs_embeds=embeds[None]).logits[0, -1]
    seen = logits[written]
    logits[written] = torch.where(seen < 0, seen * penalty, seen / penalty)
    first, second = (
        logits[caption[common]] if common < len(caption) else logits[list(eos)].max() for caption in (mine, other)
    )
    return abs(float(first - second))


def transformers_captions(
    llama: LlamaForCausalLM,
    images: Sequence[torch.Tensor],
    *,
    shared_prefix: torch.Tensor,
    eos_token_ids: Sequence[int] = EOS,
    batch: int = 25,
    **options: Any,
) -> list[list[tuple[int, ...]]]:
    """The token ids that `generate` gives each image, best first, without end token."""
    found: list[list[list[int]]] = []
    for start in range(0, len(images), batch):
        embeds = torch.stack([torch.cat([shared_prefix, image]) for image in images[start : start + batch]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = llama.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                eos_token_id=list(eos_token_ids),
                pad_token_id=eos_token_ids[0],
                **options,
            )
        found += rows.unflatten(0, (len(embeds), -1)).tolist()
    return [[_until_end(row, eos_token_ids) for row in rows] for rows in found]


def _until_end(row: Sequence[int], eos: Sequence[int]) -> tuple[int, ...]:
    ends = [place for place, token in enumerate(row) if token in eos]
    return tuple(row[: ends[0]] if ends else row)
