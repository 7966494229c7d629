"""A caption is a function of its image: any mix of lengths, slots and arrival orders gives what it gets alone."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captioner.config import DecodingConfig
from captioner.decoding import Engine, Fork, Generation, Redraw, Request
from tests.hypothesis_profiles import max_examples
from tests.unit.decoding.decoding_models import engine_of, random_prefixes, tiny_llama

NUM_IMAGES = 12
STRATEGIES = {
    "greedy": {},
    "drawn": {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2},
    "drawn from all": {"do_sample": True, "top_k": 0},
    "three drawn": {"do_sample": True, "num_captions": 3, "temperature": 1.4},
    "drawn again": {"redraw_repetitive": 2, "temperature": 1.4},
    "three drawn again": {"redraw_repetitive": 1, "do_sample": True, "num_captions": 3},
    "beams": {"num_beams": 3, "num_captions": 2},
    "beams with a penalty": {"num_beams": 2, "repetition_penalty": 1.4, "length_penalty": 0.3},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LENGTHS = {
    "one token": [1] * NUM_IMAGES,
    "two tokens": [2] * NUM_IMAGES,
    "short": [5, 1, 3, 2] * 3,
    "long and short": [90, 1, 64, 65, 130, 2] * 2,
}


@cache
def llama_of(kv_heads: int):
    return tiny_llama(num_key_value_heads=kv_heads)


@cache
def images_of(kv_heads: int, lengths: str) -> list[torch.Tensor]:
    longest = random_prefixes(llama_of(kv_heads), NUM_IMAGES, max(LENGTHS[lengths]))
    return [image[:length] for image, length in zip(longest, LENGTHS[lengths], strict=True)]


@cache
def alone(kv_heads: int, strategy: str, lengths: str, image: int) -> Generation:
    prefix = images_of(kv_heads, lengths)[image]
    return next(engine_for_one(kv_heads, strategy, lengths).generate([request(image, image, prefix, strategy)]))


@cache
def engine_for_one(kv_heads: int, strategy: str, lengths: str) -> Engine:
    return engine_for(kv_heads, strategy, lengths, slots=3)


def engine_for(kv_heads: int, strategy: str, lengths: str, *, slots: int) -> Engine:
    decoding = DecodingConfig(max_new_tokens=18, **STRATEGIES[strategy])
    decodings = [decoding, replace(decoding, do_sample=True)] if decoding.redraw_repetitive else [decoding]
    sizes = {"max_prefix_len": max(LENGTHS[lengths]), "slots": slots}
    return engine_of(llama_of(kv_heads), decoding, decodings=decodings, **sizes)


def request(name: object, image: int, prefix: torch.Tensor, strategy: str) -> Request:
    most = STRATEGIES[strategy].get("redraw_repetitive", 0)
    redraw = Redraw(is_wanted=lambda found: sum(found.token_ids) % 2 == 0, most=most, decoding=1) if most else None
    return Request(name, prefix, seed=image, max_new_tokens=limit_of(image), forks=(Fork(redraw=redraw),))


def limit_of(image: int) -> int:
    return 18 if image % 3 else 4 + image


@max_examples(25)
@given(
    kv_heads=st.sampled_from([2, 8]),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    lengths=st.sampled_from(sorted(LENGTHS)),
    slots=st.integers(3, 40),
    order=st.lists(st.integers(0, NUM_IMAGES - 1), min_size=1, max_size=40),
    pauses=st.lists(st.integers(0, 3), min_size=40, max_size=40),
)
def test_an_image_gets_the_caption_it_gets_alone(kv_heads, strategy, lengths, slots, order, pauses):
    engine = engine_for(kv_heads, strategy, lengths, slots=slots)
    images = images_of(kv_heads, lengths)
    found = []
    for place, image in enumerate(order):
        while not engine.num_free:
            found += engine.step()
        engine.admit([request((place, image), image, images[image], strategy)])
        for _ in range(pauses[place]):
            found += engine.step() if not engine.is_idle else []
    while not engine.is_idle:
        found += engine.step()
    assert sorted(generation.id for generation in found) == list(enumerate(order))
    for generation in found:
        expected = alone(kv_heads, strategy, lengths, generation.id[1])
        assert generation.hypotheses == expected.hypotheses, "tokens and scores, to the last bit"
