"""Limits, ranking, refusals and memory of the engine; and the model is not changed."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from captioner.config import DecodingConfig
from captioner.decoding import Request, sampling, strategy
from captioner.decoding.attention import TransformersLayers
from captioner.decoding.prefill import Chunk, Prompt
from captioner.errors import ConfigError, ShapeError
from captioner.model.module import allocate
from tests.unit.decoding.decoding_models import (
    EOS,
    captions,
    engine_of,
    random_prefixes,
    strategy_of,
    tiny_llama,
    token_ids,
)


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

    def sample_from_all(scores, uniforms, decoding, **_):
        return sampling.sample(scores, uniforms, decoding, looks_at_all=True)

    monkeypatch.setattr(strategy, "sample", sample_from_all)
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
    """Fails where the host waits for the device, or a shape depends on values: a CUDA graph can record neither."""

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


@pytest.mark.parametrize("max_prefix_len", [1, 4, 100])
@pytest.mark.parametrize("strategy", DEVICE_HALVES)
def test_the_device_half_of_a_step_reads_nothing_back(llama, strategy, max_prefix_len):
    decoding = DecodingConfig(max_new_tokens=8, **strategy)
    with torch.inference_mode():
        model, device_half = strategy_of(llama, decoding, max_prefix_len=max_prefix_len)
        slots = list(range(model.layout.group_size))
        [prefix] = random_prefixes(llama, 1, max_prefix_len)
        model.buffers.place([(slot, 0, *model.layout.columns_of(max_prefix_len, 0)) for slot in slots])
        model.buffers.begin([slots], [prefix[-1]], [slots])
        if model.layout.prompt_rows:
            prompt = Prompt(prefix[:-1], 3, (), is_shared=model.layout.stores_prefixes)
            model.buffers.fill([Chunk(prompt, 0, len(prompt.embeds), 0)], [slots], model.layout.prompt_rows)
        for shape in model.layout.full_shapes():
            with NoHostRead():
                device_half.propose(shape)


class OneDevice(TorchDispatchMode):
    """Fails for a tensor of the CPU: a CUDA graph would record a copy of the values that it has now."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)}
        assert devices <= {"meta"}, func
        return made


@pytest.mark.parametrize("max_prefix_len", [1, 4, 100])
@pytest.mark.parametrize("strategy", DEVICE_HALVES)
def test_the_device_half_of_a_step_stays_on_its_device(strategy, max_prefix_len):
    llama = allocate(LlamaForCausalLM, tiny_llama().config, dtype=torch.bfloat16, device=torch.device("meta"))
    with torch.inference_mode():
        decoding = DecodingConfig(max_new_tokens=8, **strategy)
        model, device_half = strategy_of(llama, decoding, max_prefix_len=max_prefix_len)
        with OneDevice():
            for shape in model.layout.full_shapes():
                assert device_half.propose(shape).device.type == "meta"


def test_an_engine_frees_its_memory_without_the_garbage_collector(llama, images):
    run_layers, caches = TransformersLayers(llama), []

    def layers(embeds, positions, view):
        caches.append(weakref.ref(view.stores.own))
        return run_layers(embeds, positions, view)

    layers.blocks = run_layers.blocks

    gc.disable()
    try:
        for strategy in ({}, {"num_beams": 3}):
            engine = engine_of(llama, DecodingConfig(max_new_tokens=4, **strategy), layers=layers)
            assert len(list(engine.generate([Request(0, images[0])]))) == 1
            assert caches[-1]() is not None
            del engine
            assert caches[-1]() is None, strategy
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


def test_the_model_answers_as_before_while_an_engine_runs_it(llama, images):
    prompt, config = torch.arange(12)[None], llama.config.to_dict()
    weights = [parameter.clone() for parameter in llama.parameters()]
    before = llama(prompt).logits
    engine = engine_of(llama, DecodingConfig(max_new_tokens=4))
    engine.admit([Request(0, images[0])])
    engine.begin_step()
    assert torch.equal(llama(prompt).logits, before)
    assert len([*engine.end_step(), *engine.generate([])]) == 1
    assert torch.equal(llama(prompt).logits, before)
    assert llama.config.to_dict() == config
    assert all(torch.equal(a, b) for a, b in zip(weights, llama.parameters(), strict=True))


def test_an_engine_uses_the_weights_of_its_model_and_not_a_copy(llama, images):
    llama = copy.deepcopy(llama)
    engine = engine_of(llama, DecodingConfig(max_new_tokens=4))
    with torch.no_grad():
        llama.model.norm.weight.zero_()
    [generation] = engine.generate([Request(0, images[0])])
    assert generation.best.mean_logprob == pytest.approx(-math.log(llama.config.vocab_size))


def test_a_caption_that_cannot_fit_the_context_is_refused_at_start(llama):
    with pytest.raises(ConfigError, match=r"--max-new-tokens is 253.* 3 prompt tokens, 1 of the image.*at most 252"):
        engine_of(llama, DecodingConfig(max_new_tokens=253))
    engine_of(llama, DecodingConfig(max_new_tokens=252))


def test_fewer_slots_than_one_image_takes_are_refused(llama):
    with pytest.raises(ConfigError, match="--slots is 3; expected at least 4"):
        engine_of(llama, DecodingConfig(num_beams=4), slots=3)
    with pytest.raises(ConfigError, match="--slots is 3; expected at least 5"):
        engine_of(llama, DecodingConfig(do_sample=True, num_captions=5), slots=3)


def test_a_prefix_that_does_not_fit_is_refused_by_name(llama):
    engine = engine_of(llama, DecodingConfig(), max_prefix_len=2)
    for shape in ((3, 64), (1, 32), (0, 64), (64,)):
        with pytest.raises(ShapeError, match=r"request 'cat' is float.*float\[1 to 2, 64\]"):
            engine.admit([Request("cat", torch.zeros(shape))])
