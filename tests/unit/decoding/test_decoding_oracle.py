"""Oracle: the engine's captions are those of `LlamaForCausalLM.generate` with the same weights, in fp32."""

import pytest
import torch

from captioner.config import DecodingConfig
from tests.unit.decoding.decoding_models import (
    EOS,
    assert_same_or_tied,
    captions,
    random_prefixes,
    tiny_llama,
    token_ids,
    transformers_captions,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("shared_len", "prefix_len"), [(1, 1), (9, 1), (0, 1), (4, 2), (1, 12)])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_greedy_captions_are_those_of_transformers(shared_len, prefix_len, kv_heads):
    llama = tiny_llama(num_key_value_heads=kv_heads)
    images = random_prefixes(llama, 50, prefix_len)
    shared = random_prefixes(llama, 1, shared_len, seed=2)[0]
    ours = captions(llama, images, DecodingConfig(max_new_tokens=24), shared_prefix=shared, slots=25)
    theirs = transformers_captions(llama, images, shared_prefix=shared, max_new_tokens=24, do_sample=False)
    assert token_ids(ours) == theirs
    assert len({len(generation.best.token_ids) for generation in ours}) > 10, "captions of many lengths"


def test_greedy_captions_of_576_patch_tokens_are_those_of_transformers():
    llama = tiny_llama(max_position_embeddings=1024)
    images = random_prefixes(llama, 12, 576)
    shared = random_prefixes(llama, 1, 5, seed=2)[0]
    ours = captions(llama, images, DecodingConfig(max_new_tokens=16), shared_prefix=shared)
    theirs = transformers_captions(llama, images, shared_prefix=shared, max_new_tokens=16, do_sample=False)
    assert token_ids(ours) == theirs


def test_greedy_captions_of_llama_3_geometry_are_those_of_transformers():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    llama = tiny_llama(vocab_size=128256, intermediate_size=224, rope_parameters=rope)
    images = random_prefixes(llama, 24, 1)
    shared = random_prefixes(llama, 1, 9, seed=2)[0]
    ends = range(0, 128256, 16)
    decoding = DecodingConfig(max_new_tokens=24)
    ours = captions(llama, images, decoding, shared_prefix=shared, eos_token_ids=ends, slots=12)
    theirs = transformers_captions(
        llama, images, shared_prefix=shared, eos_token_ids=ends, max_new_tokens=24, do_sample=False
    )
    assert token_ids(ours) == theirs


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.7}, {"min_new_tokens": 9}])
def test_greedy_captions_with_changed_logits_are_those_of_transformers(options):
    llama = tiny_llama()
    images = random_prefixes(llama, 100, 1)
    shared = random_prefixes(llama, 1, 3, seed=2)[0]
    ours = captions(llama, images, DecodingConfig(max_new_tokens=24, **options), shared_prefix=shared, slots=25)
    theirs = transformers_captions(llama, images, shared_prefix=shared, max_new_tokens=24, do_sample=False, **options)
    plain = transformers_captions(llama, images[:25], shared_prefix=shared, max_new_tokens=24, do_sample=False)
    prefixes = [torch.cat([shared, image]) for image in images]
    assert_same_or_tied(llama, prefixes, ours, theirs, repetition_penalty=options.get("repetition_penalty", 1.0))
    assert theirs[:25] != plain, "the option must matter"


@pytest.mark.parametrize("eos", [EOS, (3,), tuple(range(0, 160, 8)), ()])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 2.0, "num_captions": 3},
        {"num_beams": 4, "length_penalty": -0.5, "num_captions": 2},
        {"num_beams": 2, "early_stopping": True, "num_captions": 2},
        {"num_beams": 4, "repetition_penalty": 1.5, "min_new_tokens": 5},
    ],
)
def test_beam_captions_are_those_of_transformers(eos, options):
    llama = tiny_llama()
    images = random_prefixes(llama, 10, 1)
    shared = random_prefixes(llama, 1, 3, seed=2)[0]
    decoding = DecodingConfig(max_new_tokens=20, **options)
    ours = captions(llama, images, decoding, shared_prefix=shared, eos_token_ids=eos, slots=16)
    theirs = transformers_captions(
        llama,
        images,
        shared_prefix=shared,
        eos_token_ids=eos or (10**6,),
        max_new_tokens=20,
        do_sample=False,
        **named_by_transformers(options),
    )
    assert token_ids(ours) == theirs


def named_by_transformers(options):
    return {"num_return_sequences" if name == "num_captions" else name: value for name, value in options.items()}


def test_beam_captions_of_long_prefixes_are_those_of_transformers():
    llama = tiny_llama()
    images = random_prefixes(llama, 20, 7)
    shared = random_prefixes(llama, 1, 3, seed=2)[0]
    ours = captions(llama, images, DecodingConfig(max_new_tokens=20, num_beams=3), shared_prefix=shared, slots=24)
    theirs = transformers_captions(llama, images, shared_prefix=shared, max_new_tokens=20, do_sample=False, num_beams=3)
    assert token_ids(ours) == theirs


def test_beam_scores_are_those_of_transformers():
    llama = tiny_llama()
    image = random_prefixes(llama, 1, 1)[0]
    shared = random_prefixes(llama, 1, 3, seed=2)[0]
    ours = captions(
        llama, [image], DecodingConfig(max_new_tokens=20, num_beams=4, num_captions=4), shared_prefix=shared
    )
    embeds = torch.cat([shared, image])[None]
    theirs = llama.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        eos_token_id=list(EOS),
        pad_token_id=EOS[0],
        max_new_tokens=20,
        do_sample=False,
        num_beams=4,
        num_return_sequences=4,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = [hypothesis.score for hypothesis in ours[0].hypotheses]
    assert scores == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-5)


@pytest.mark.parametrize("strategy", [{}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 3}])
def test_logprobs_are_those_of_the_model_over_the_finished_caption(strategy):
    llama = tiny_llama()
    images = random_prefixes(llama, 20, 2)
    shared = random_prefixes(llama, 1, 3, seed=2)[0]
    decoding = DecodingConfig(max_new_tokens=20, repetition_penalty=1.3, **strategy)
    for image, generation in zip(images, captions(llama, images, decoding, shared_prefix=shared), strict=True):
        best = generation.best
        tokens = torch.tensor(best.token_ids, dtype=torch.long)
        with torch.no_grad():
            embeds = torch.cat([shared, image, llama.get_input_embeddings()(tokens)])
            logprobs = llama(inputs_embeds=embeds[None]).logits[0, len(shared) + len(image) - 1 :].log_softmax(-1)
        chosen = logprobs[: len(tokens)].gather(1, tokens[:, None])[:, 0].tolist()
        ends = logprobs[len(tokens), list(EOS)].tolist() if best.finish_reason == "stop" else [None]
        expected = [chosen if end is None else [*chosen, end] for end in ends]
        means = [sum(values) / len(values) for values in expected]
        assert min(abs(best.mean_logprob - mean) for mean in means) < 1e-5
        assert min(abs(best.min_logprob - min(values)) for values in expected) < 1e-5


MIXED = (1, 600, 2, 40, 64, 65, 66, 129, 300, 1, 431, 77)
"""Lengths of prefixes side by side; some end on a block of 64 rows, some before or after."""


@pytest.fixture(scope="module")
def long_llama():
    return tiny_llama(max_position_embeddings=1024)


@pytest.fixture(scope="module", params=[0, 5])
def mixed(request, long_llama):
    """Images, and the tokens that are read before each."""
    images = [random_prefixes(long_llama, 1, length, seed=10 + i)[0] for i, length in enumerate(MIXED)]
    return images, random_prefixes(long_llama, 1, request.param, seed=2)[0]


@pytest.fixture(
    scope="module", params=[{}, {"num_beams": 3, "num_captions": 2}, {"num_beams": 2, "repetition_penalty": 1.4}]
)
def of_mixed(request, long_llama, mixed):
    """Options, and the captions that transformers gives each image alone with them."""
    images, shared = mixed
    options = {"max_new_tokens": 16, "do_sample": False, **named_by_transformers(request.param)}
    alone = [transformers_captions(long_llama, [image], shared_prefix=shared, **options) for image in images]
    return request.param, [captions for [captions] in alone]


@pytest.mark.parametrize("slots", [3, 8])
def test_captions_of_prefixes_of_mixed_lengths_are_those_of_transformers(long_llama, mixed, of_mixed, slots):
    images, shared = mixed
    options, theirs = of_mixed
    ours = captions(long_llama, images, DecodingConfig(max_new_tokens=16, **options), shared_prefix=shared, slots=slots)
    assert token_ids(ours) == theirs
