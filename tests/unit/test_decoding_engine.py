"""What the engine promises beside its tokens: limits, ranks, refusals, memory, and a model left as it was."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from captioner.config import DecodingConfig
from captioner.decoding import Request, sampling, strategy
from captioner.decoding.step import StepShape
from captioner.errors import ConfigError, ShapeError
from captioner.model.module import allocate
from tests.unit.decoding_models import EOS, captions, engine_of, random_prefixes, tiny_llama, token_ids


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def images(llama):
    return random_prefixes(llama, 40, 1)


def test_a_caption_that_ends_itself_has_no_end_token_and_the_reason_stop(llama, images):
    for generation in captions(llama, images, DecodingConfig(max_new_tokens=30)):
        best = generation.best
        assert not set(best.token_ids) & set(EOS)
        assert best.finish_reason == ("length" if len(best.token_ids) == 30 else "stop")


def test_a_request_may_lower_the_limit_and_not_raise_it(llama, images):
    engine = engine_of(llama, DecodingConfig(max_new_tokens=10), eos_token_ids=())
    limits = [1, 5, 10, 99, None]
    requests = [Request(i, images[i], max_new_tokens=limit) for i, limit in enumerate(limits)]
    found = {generation.id: generation.best for generation in engine.generate(requests)}
    assert [len(found[i].token_ids) for i in range(5)] == [1, 5, 10, 10, 10]
    assert {best.finish_reason for best in found.values()} == {"length"}


def test_a_stop_check_ends_a_caption_and_keeps_its_tokens(llama, images):
    decoding = DecodingConfig(max_new_tokens=20)
    asked = []

    def is_stopped(tokens):
        asked.append(len(tokens))
        return len(tokens) == 4

    for generation in captions(llama, images, decoding, eos_token_ids=(), is_stopped=is_stopped):
        assert len(generation.best.token_ids) == 4
        assert generation.best.finish_reason == "stop"
    assert len(asked) == 4 * len(images)


def test_beams_obey_a_stop_check(llama, images):
    decoding = DecodingConfig(max_new_tokens=20, num_beams=3, num_captions=3)
    found = captions(llama, images[:5], decoding, eos_token_ids=(), is_stopped=lambda tokens: tokens[-1] % 5 == 0)
    for generation in found:
        assert len(generation.hypotheses) == 3
        for hypothesis in generation.hypotheses:
            assert all(token % 5 for token in hypothesis.token_ids[:-1])


def test_drawn_candidates_come_best_first_and_the_set_holds_the_caption_drawn_alone(llama, images):
    one = captions(llama, images, DecodingConfig(max_new_tokens=12, do_sample=True))
    four = captions(llama, images, DecodingConfig(max_new_tokens=12, do_sample=True, num_captions=4))
    for single, several in zip(one, four, strict=True):
        scores = [hypothesis.score for hypothesis in several.hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 4
        assert single.best in several.hypotheses
    assert len({ids for row in token_ids(four) for ids in row}) > 3 * len(images)


def test_another_seed_draws_another_caption(llama, images):
    engine = engine_of(llama, DecodingConfig(max_new_tokens=12, do_sample=True))
    found = list(engine.generate(Request(seed, images[0], seed=seed) for seed in range(20)))
    assert len({generation.best.token_ids for generation in found}) > 15


def test_draws_from_a_wide_nucleus_are_those_of_the_whole_vocabulary(monkeypatch):
    llama = tiny_llama(vocab_size=2000, initializer_range=0.02)
    images = random_prefixes(llama, 12, 1)
    decoding = DecodingConfig(max_new_tokens=6, do_sample=True, top_k=0, top_p=0.97)
    few_first = captions(llama, images, decoding)
    monkeypatch.setattr(sampling, "_NUCLEUS_CANDIDATES", 2000)
    assert token_ids(few_first) == token_ids(captions(llama, images, decoding))


@pytest.mark.parametrize("wide_row", [1, 15], ids=["a neighbour", "an idle slot"])
def test_a_wide_nucleus_next_door_changes_no_caption(llama, images, monkeypatch, wide_row):
    decoding = DecodingConfig(max_new_tokens=8, do_sample=True, top_k=0, top_p=0.9, repetition_penalty=1.3)
    alone = captions(llama, images[:8], decoding)

    def sample_with_a_wide_row(scores, uniforms, decoding, *, looks_at_all=False):
        token_ids, is_exact = sampling.sample(scores, uniforms, decoding, looks_at_all=looks_at_all)
        if not looks_at_all:
            redone.append(len(scores))
            is_exact = is_exact.clone()
            is_exact[wide_row] = False
        return token_ids, is_exact

    redone = []
    monkeypatch.setattr(strategy, "sample", sample_with_a_wide_row)
    assert token_ids(captions(llama, images[:8], decoding)) == token_ids(alone)
    assert redone


HOST_READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique"}


class NoHostRead(TorchDispatchMode):
    """Fails for what makes the host wait for the device, or a shape depend on values: a CUDA graph records neither."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in HOST_READS, func
        return func(*args, **(kwargs or {}))


DEVICE_HALVES = [
    {},
    {"min_new_tokens": 3, "repetition_penalty": 1.2},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 0, "top_p": 0.9, "min_p": 0.01},
    {"num_beams": 3, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("prefix_len", [1, 4])
@pytest.mark.parametrize("strategy", DEVICE_HALVES)
def test_the_device_half_of_a_step_reads_nothing_back(llama, strategy, prefix_len):
    engine = engine_of(llama, DecodingConfig(max_new_tokens=8, **strategy), prefix_len=prefix_len)
    engine.admit([Request(0, random_prefixes(llama, 1, prefix_len)[0])])
    with torch.inference_mode():
        shape = StepShape(num_rows=16, window=16, num_prompts=engine._fill_fresh())
        assert shape.num_prompts == (prefix_len > 1)
        with NoHostRead():
            engine._strategy.propose(shape)


class OneDevice(TorchDispatchMode):
    """Fails for a tensor of the CPU: a CUDA graph would record the copy of what it held then."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)}
        assert devices <= {"meta"}, func
        return made


@pytest.mark.parametrize("prefix_len", [1, 4])
@pytest.mark.parametrize("strategy", DEVICE_HALVES)
def test_the_device_half_of_a_step_stays_on_its_device(strategy, prefix_len):
    llama = allocate(LlamaForCausalLM, tiny_llama().config, dtype=torch.bfloat16, device=torch.device("meta"))
    decoding, shared = DecodingConfig(max_new_tokens=8, **strategy), torch.empty(3, 64, device="meta")
    engine = engine_of(llama, decoding, slots=16, prefix_len=prefix_len, shared_prefix=shared)
    with torch.inference_mode(), OneDevice():
        for shape in engine._model.layout.full_shapes():
            assert engine._strategy.propose(shape).device.type == "meta"


def test_an_engine_gives_its_memory_back_without_the_garbage_collector(llama, images):
    gc.disable()
    try:
        for strategy in ({}, {"num_beams": 3}):
            engine = engine_of(llama, DecodingConfig(max_new_tokens=4, **strategy))
            assert len(list(engine.generate([Request(0, images[0])]))) == 1
            kv = weakref.ref(engine._model.buffers.kv)
            del engine
            assert kv() is None, strategy
    finally:
        gc.enable()


def test_an_endless_stream_is_answered_while_it_runs(llama, images):
    def endless():
        number = 0
        while True:
            yield Request(number, images[number % len(images)])
            number += 1

    found = engine_of(llama, DecodingConfig(max_new_tokens=8)).generate(endless())
    assert len({next(found).id for _ in range(100)}) == 100


def test_the_model_is_left_as_it_was_found(llama, images):
    before = llama.config._attn_implementation
    weights = [parameter.clone() for parameter in llama.parameters()]
    captions(llama, images[:3], DecodingConfig(max_new_tokens=4))
    assert llama.config._attn_implementation == before
    assert all(torch.equal(a, b) for a, b in zip(weights, llama.parameters(), strict=True))


def test_a_caption_that_cannot_fit_the_context_is_refused_at_start(llama):
    with pytest.raises(ConfigError, match=r"--max-new-tokens is 253.* 3 prompt tokens, 1 of the image.*at most 252"):
        engine_of(llama, DecodingConfig(max_new_tokens=253))
    engine_of(llama, DecodingConfig(max_new_tokens=252))


def test_fewer_slots_than_one_image_takes_are_refused(llama):
    with pytest.raises(ConfigError, match="--slots is 3; expected at least 4"):
        engine_of(llama, DecodingConfig(num_beams=4), slots=3)
    with pytest.raises(ConfigError, match="--slots is 3; expected at least 5"):
        engine_of(llama, DecodingConfig(do_sample=True, num_captions=5), slots=3)


def test_a_prefix_of_another_shape_is_refused_by_name(llama):
    engine = engine_of(llama, DecodingConfig())
    with pytest.raises(ShapeError, match=r"request 'cat' is float\[3, 64\].*float\[1, 64\]"):
        engine.admit([Request("cat", torch.zeros(3, 64))])
