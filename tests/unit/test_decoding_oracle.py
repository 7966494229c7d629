"""Oracle: the engine's captions are those of `LlamaForCausalLM.generate` with the same weights, in fp32."""

import warnings
from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from captioner.config import DecodingConfig
from captioner.decoding import Engine, Generation, Request

EOS = 3


def tiny_llama(*, seed: int = 0, eos_bias: float = 0.0, **changes) -> LlamaForCausalLM:
    """A random model sharp enough for captions that differ; `eos_bias` makes the end token likelier."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def prefixes(llama: LlamaForCausalLM, number: int, length: int, *, seed: int = 1) -> list[torch.Tensor]:
    width = llama.config.hidden_size
    return list(torch.randn(number, length, width, generator=torch.Generator().manual_seed(seed)) * 0.5)


def captions(
    llama: LlamaForCausalLM,
    images: Sequence[torch.Tensor],
    decoding: DecodingConfig,
    *,
    shared: torch.Tensor,
    eos: Sequence[int] = (EOS,),
    slots: int = 8,
) -> list[Generation]:
    engine = Engine(
        llama, decoding=decoding, eos_token_ids=eos, shared_prefix=shared, prefix_len=len(images[0]), slots=slots
    )
    done = engine.generate(Request(i, image, seed=i) for i, image in enumerate(images))
    return sorted(done, key=lambda generation: generation.id)


def transformers_captions(
    llama: LlamaForCausalLM,
    images: Sequence[torch.Tensor],
    *,
    shared: torch.Tensor,
    eos: Sequence[int] = (EOS,),
    batch: int = 16,
    **options,
) -> list[list[tuple[int, ...]]]:
    """Token ids of each image's captions, best first, without end token."""
    found = []
    for start in range(0, len(images), batch):
        embeds = torch.stack([torch.cat([shared, image]) for image in images[start : start + batch]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = llama.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                eos_token_id=list(eos),
                pad_token_id=eos[0],
                **options,
            )
        found += rows.unflatten(0, (len(embeds), -1)).tolist()
    return [[until_end(row, eos) for row in rows] for rows in found]


def until_end(row: Sequence[int], eos: Sequence[int]) -> tuple[int, ...]:
    ends = [place for place, token in enumerate(row) if token in eos]
    return tuple(row[: ends[0]] if ends else row)


@pytest.mark.parametrize(("shared_len", "prefix_len"), [(1, 1), (9, 1), (0, 1), (4, 2), (1, 12)])
def test_greedy_captions_are_those_of_transformers(shared_len, prefix_len):
    llama = tiny_llama()
    images = prefixes(llama, 100, prefix_len)
    shared = prefixes(llama, 1, shared_len, seed=2)[0]
    eos = [EOS, 17, 45, 99]
    ours = captions(llama, images, DecodingConfig(max_new_tokens=24), shared=shared, eos=eos)
    theirs = transformers_captions(llama, images, shared=shared, eos=eos, max_new_tokens=24, do_sample=False)
    assert [g.best.token_ids for g in ours] == [rows[0] for rows in theirs]
    lengths = {len(g.best.token_ids) for g in ours}
    assert len(lengths) > 10, "the test needs captions of many lengths"
