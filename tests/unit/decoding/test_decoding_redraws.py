"""Captions that are written once more: the draws of further captions, from the prompt that their slot holds."""

from dataclasses import replace

import pytest
import torch

from captioner.config import DecodingConfig
from captioner.decoding import Fork, Redraw, Request
from captioner.errors import ConfigError, ShapeError
from captioner.schema import FinishReason
from tests.unit.decoding.decoding_models import engine_of, random_prefixes, tiny_llama
from tests.unit.model.operation_recorder import OperationRecorder

GREEDY = DecodingConfig(max_new_tokens=10)
DRAWN = replace(GREEDY, do_sample=True)
SIZES = {"max_prefix_len": 130, "max_suffix_len": 20, "num_forks": 2, "slots": 5}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


def requests(llama, *, longest=130, **fork):
    lengths = [min(length, longest) for length in (130, 1, 70, 8, 129)]
    images = [random_prefixes(llama, 1, length, seed=length)[0] for length in lengths]
    suffixes = [random_prefixes(llama, 1, length, seed=7 + length)[0] for length in (15, 3)]
    return [
        Request(number, image, seed=number, forks=tuple(Fork(suffix=suffix, **fork) for suffix in suffixes))
        for number, image in enumerate(images)
    ]


def written(engine, asked):
    """The token ids of each request's forks, in no order."""
    return {
        found.id: [sorted(one.token_ids for one in fork) for fork in found.forks] for found in engine.generate(asked)
    }


def always(_):
    return True


@pytest.fixture(scope="module", params=[130, 40], ids=["stored once", "short"])
def longest(request):
    return request.param


@pytest.fixture(scope="module")
def without_redraws(llama, longest):
    """What is written greedily, as the first draw and as four draws."""
    plain, sizes = requests(llama, longest=longest), SIZES | {"max_prefix_len": longest}
    four = engine_of(llama, replace(DRAWN, num_captions=4), **sizes | {"slots": 8})
    engines = engine_of(llama, GREEDY, **sizes), engine_of(llama, DRAWN, **sizes), four
    return [written(engine, plain) for engine in engines]


@pytest.mark.parametrize("is_recorded", [False, True])
def test_redraws_of_a_greedy_caption_are_the_draws_of_further_captions(llama, longest, without_redraws, is_recorded):
    recorder = OperationRecorder() if is_recorded else None
    sizes = SIZES | {"max_prefix_len": longest, "recorder": recorder}
    asked = requests(llama, longest=longest, redraw=Redraw(is_wanted=always, most=3, decoding=1))
    found = written(engine_of(llama, GREEDY, decodings=[GREEDY, DRAWN], **sizes), asked)
    greedy, first, four = without_redraws
    for image in found:
        for fork in range(2):
            (of_greedy,), (of_first,) = greedy[image][fork], first[image][fork]
            further = list(four[image][fork])
            further.remove(of_first)
            assert found[image][fork] == sorted([of_greedy, *further])


def test_redraws_of_several_drawn_captions_are_those_behind_them(llama):
    two = replace(DRAWN, num_captions=2)
    asked = requests(llama, redraw=Redraw(is_wanted=always, most=1, decoding=0))
    found = written(engine_of(llama, two, **SIZES), asked)
    four = written(engine_of(llama, replace(DRAWN, num_captions=4), **SIZES | {"slots": 8}), requests(llama))
    assert found == four


def test_a_caption_is_written_again_until_one_is_as_it_should_be(llama):
    def is_cut(hypothesis):
        return hypothesis.finish_reason == FinishReason.LENGTH

    asked = requests(llama, redraw=Redraw(is_wanted=is_cut, most=4, decoding=1))
    engine = engine_of(llama, GREEDY, decodings=[GREEDY, replace(DRAWN, temperature=3.0)], **SIZES)
    found = [fork for generation in engine.generate(asked) for fork in generation.forks]
    assert {len(fork) for fork in found} >= {1, 2, 3}
    for fork in found:
        whole = [one for one in fork if not is_cut(one)]
        assert len(whole) == 1 or (not whole and len(fork) == 5)


def test_a_redraw_keeps_limit_stop_strings_and_allowed_tokens(llama):
    def evens(token_ids):
        return torch.arange(160) % 2 == len(token_ids) % 2

    fork = {"max_new_tokens": 6, "allowed_tokens": evens, "is_stopped": lambda ids: ids[-1] % 5 == 0}
    redraw = Redraw(is_wanted=always, most=2, decoding=1)
    options = {"decodings": [GREEDY, DRAWN], "is_constrained": True, "eos_token_ids": (), **SIZES}
    found = written(engine_of(llama, GREEDY, **options), requests(llama, redraw=redraw, **fork))
    drawn = [ids for of_image in found.values() for texts in of_image for ids in texts]
    assert len(drawn) == 5 * 2 * 3
    for ids in drawn:
        assert [token % 2 for token in ids] == [place % 2 for place in range(len(ids))]
        assert len(ids) == 6 or ids[-1] % 5 == 0
        assert all(token % 5 for token in ids[:-1])


def test_an_engine_refuses_redraws_of_beams_and_by_decodings_that_it_lacks(llama):
    beams = engine_of(llama, replace(GREEDY, num_beams=2), **SIZES)
    with pytest.raises(ConfigError, match="request 0 has a redraw; expected an engine without beams"):
        beams.admit(requests(llama, redraw=Redraw(is_wanted=always, most=1, decoding=0))[:1])
    with pytest.raises(ShapeError, match="names a decoding beyond the 1 of this engine"):
        engine_of(llama, GREEDY, **SIZES).admit(
            requests(llama, redraw=Redraw(is_wanted=always, most=1, decoding=1))[:1]
        )
