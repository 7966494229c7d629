"""Several texts about one image: each as if it were alone, the image computed and stored once."""

import pytest
import torch

from captioner.config import DecodingConfig
from captioner.decoding import Fork, Request
from captioner.decoding.cuda.fused_llama import FusedLlama
from captioner.decoding.cuda.operations import PlainOperations
from captioner.decoding.layout import SlotLayout
from captioner.decoding.stores import Stores
from captioner.errors import ConfigError, ShapeError
from tests.unit.decoding.decoding_models import (
    EOS,
    engine_of,
    random_prefixes,
    tiny_llama,
    transformers_captions,
)
from tests.unit.model.operation_recorder import OperationRecorder

LENGTHS = (130, 1, 70, 8)
SUFFIXES = (0, 15, 3, 70)
SIZES = {"max_prefix_len": 130, "max_suffix_len": 70, "num_forks": 4, "slots": 20}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def images(llama):
    return [random_prefixes(llama, 1, length, seed=length)[0] for length in LENGTHS]


@pytest.fixture(scope="module")
def suffixes(llama):
    return [random_prefixes(llama, 1, length, seed=7 + length)[0] for length in SUFFIXES]


def written(engine, requests):
    return {generation.id: generation for generation in engine.generate(requests)}


def forked(images, suffixes, **changes):
    return [
        Request(i, image, seed=i, forks=tuple(Fork(suffix=suffix, **changes) for suffix in suffixes))
        for i, image in enumerate(images)
    ]


@pytest.fixture(scope="module", params=[SIZES, SIZES | {"max_prefix_len": 60}], ids=["stored once", "short"])
def sizes(request):
    return request.param


@pytest.fixture(scope="module", params=[{}, {"num_beams": 3, "num_captions": 2}])
def of_transformers(request, llama, images, suffixes, sizes):
    """Options, and the captions that transformers gives each image and suffix with them."""
    shared = random_prefixes(llama, 1, 3, seed=2)[0]
    named = {"num_return_sequences" if name == "num_captions" else name: value for name, value in request.param.items()}
    wholes = [torch.cat([image[: sizes["max_prefix_len"]], suffix]) for image in images for suffix in suffixes]
    options = {"shared_prefix": shared, "max_new_tokens": 10, "do_sample": False, **named}
    return request.param, [transformers_captions(llama, [whole], **options)[0] for whole in wholes]


@pytest.mark.parametrize("is_on_a_card", [False, True])
def test_every_fork_has_the_captions_of_transformers_for_its_whole_prompt(
    llama, images, suffixes, sizes, of_transformers, is_on_a_card
):
    options, theirs = of_transformers
    layers = FusedLlama(llama, PlainOperations()) if is_on_a_card else None
    engine = engine_of(llama, DecodingConfig(max_new_tokens=10, **options), **sizes, layers=layers)
    found = written(engine, forked([image[: sizes["max_prefix_len"]] for image in images], suffixes))
    forks = [fork for i in range(len(images)) for fork in found[i].forks]
    assert [[hypothesis.token_ids for hypothesis in fork] for fork in forks] == theirs


def test_recorded_steps_write_the_forks_of_eager_steps(llama, images, suffixes):
    decoding = DecodingConfig(max_new_tokens=10, do_sample=True, num_captions=2)
    recorded = written(engine_of(llama, decoding, **SIZES, recorder=OperationRecorder()), forked(images, suffixes))
    layers = FusedLlama(llama, PlainOperations())
    eager = written(engine_of(llama, decoding, **SIZES, layers=layers), forked(images, suffixes))
    for i in range(len(images)):
        ours, theirs = ([[one.token_ids for one in fork] for fork in found[i].forks] for found in (recorded, eager))
        assert ours == theirs


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_captions": 2}, {"num_beams": 2}])
def test_any_subset_and_order_of_forks_has_the_same_texts(llama, images, suffixes, options):
    decoding = DecodingConfig(max_new_tokens=10, **options)
    engine = engine_of(llama, decoding, **SIZES)
    forks = [Fork(suffix=suffix, seed=100 + n) for n, suffix in enumerate(suffixes)]
    orders = [(0, 1, 2, 3), (3, 1), (2,), (1, 3, 0)]
    requests = [Request(order, images[0], forks=tuple(forks[n] for n in order)) for order in orders]
    found = written(engine, [*requests, Request("other", images[2])])
    texts = {order: [[one.token_ids for one in fork] for fork in found[order].forks] for order in orders}
    for order in orders:
        assert texts[order] == [texts[orders[0]][n] for n in order]


def test_each_fork_has_its_own_limit_and_seed(llama, images):
    engine = engine_of(llama, DecodingConfig(max_new_tokens=9, do_sample=True), eos_token_ids=(), **SIZES)
    forks = (Fork(max_new_tokens=4), Fork(seed=5), Fork(max_new_tokens=99), Fork())
    [found] = engine.generate([Request(0, images[0], seed=5, max_new_tokens=7, forks=forks)])
    assert [len(fork[0].token_ids) for fork in found.forks] == [4, 7, 7, 7]
    assert found.forks[1] == found.forks[3], "the seed of the request, or the same by another way"
    [other] = engine.generate([Request(0, images[0], seed=6, forks=(Fork(seed=5), Fork()))])
    assert other.forks[0][0].token_ids[:7] == found.forks[1][0].token_ids
    assert other.forks[1] != other.forks[0]


def test_the_image_is_computed_once_for_all_forks(llama, images, suffixes):
    rows = []

    class Counting(FusedLlama):
        def __call__(self, embeds, positions, view):
            rows.append(len(view.targets))
            return super().__call__(embeds, positions, view)

    def rows_of(num_forks):
        rows.clear()
        engine = engine_of(llama, DecodingConfig(max_new_tokens=4), **SIZES, layers=Counting(llama, PlainOperations()))
        written(engine, forked(images[:1], suffixes[1:2] * num_forks))
        return sum(rows)

    one, four = rows_of(1), rows_of(4)
    assert one == 144 + 16, "129 rows of the image and 15 of the prompt, in tiles of 16"
    assert four == one + 3 * 16


def test_four_prompts_take_a_fifth_more_memory_than_one():
    llama = tiny_llama(num_hidden_layers=1)

    def bytes_of_image(num_forks):
        layout = SlotLayout.of(
            16 * num_forks,
            DecodingConfig(max_new_tokens=14),
            shared_len=1,
            max_prefix_len=576,
            max_suffix_len=15,
            num_forks=num_forks,
            blocks=FusedLlama.blocks,
        )
        assert layout.num_prefixes == 16
        stores = Stores.allocate(llama.config, layout, like=llama.lm_head.weight)
        return (stores.prefixes.nbytes + stores.own.nbytes) / 16

    assert bytes_of_image(4) <= 1.2 * bytes_of_image(1)


def test_a_place_of_the_prefix_store_is_free_when_its_last_fork_has_ended(llama, images):
    engine = engine_of(llama, DecodingConfig(max_new_tokens=9), eos_token_ids=(), **(SIZES | {"slots": 8}))
    forks = tuple(Fork(max_new_tokens=limit) for limit in (1, 2, 3, 9))
    done = [generation.id for generation in engine.generate(Request(i, images[0], forks=forks) for i in range(9))]
    assert done == list(range(9))
    assert engine.num_free == 2


def test_requests_that_an_engine_was_not_made_for_are_refused(llama, images, suffixes):
    engine = engine_of(llama, DecodingConfig(), **(SIZES | {"num_forks": 2, "max_suffix_len": 15}))
    with pytest.raises(ShapeError, match="request 'cat' has 3 forks; this engine was made for 1 to 2"):
        engine.check(Request("cat", images[0], forks=(Fork(),) * 3))
    with pytest.raises(ShapeError, match="has 0 forks"):
        engine.check(Request("cat", images[0], forks=()))
    with pytest.raises(ShapeError, match=r"suffix of request 'cat' is float\[70, 64\].*float\[0 to 15, 64\]"):
        engine.check(Request("cat", images[0], forks=(Fork(suffix=suffixes[3]),)))
    with pytest.raises(ConfigError, match="'cat' has allowed_tokens; expected an engine made with is_constrained"):
        engine.check(Request("cat", images[0], forks=(Fork(allowed_tokens=only_even),)))
    with pytest.raises(ConfigError, match="a beam search is not constrained"):
        engine_of(llama, DecodingConfig(num_beams=2), is_constrained=True)


def only_even(tokens):
    """Words with even numbers; after three of them only an end token."""
    allowed = torch.zeros(160, dtype=torch.bool)
    allowed[[EOS[0]] if len(tokens) == 3 else slice(0, None, 2)] = True
    return allowed


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 0, "top_p": 0.9}])
def test_a_constrained_fork_writes_only_what_is_allowed_and_changes_no_other(llama, images, options, is_recorded):
    decoding = DecodingConfig(max_new_tokens=9, **options)
    settings = SIZES | {"is_constrained": True, "recorder": OperationRecorder() if is_recorded else None}
    forks = (Fork(), Fork(allowed_tokens=only_even))
    requests = [Request(i, image, seed=i, forks=forks) for i, image in enumerate(images * 4)]
    found = written(engine_of(llama, decoding, **settings), requests)
    free = written(engine_of(llama, decoding, **settings), [Request(r.id, r.prefix, seed=r.seed) for r in requests])
    for request in requests:
        unconstrained, constrained = found[request.id].forks
        assert [one.token_ids for one in unconstrained] == [one.token_ids for one in free[request.id].hypotheses]
        assert len(constrained[0].token_ids) == 3
        assert all(token % 2 == 0 for token in constrained[0].token_ids)
        assert constrained[0].finish_reason == "stop"


def test_constrained_greedy_tokens_are_those_of_transformers_with_the_same_masks(llama, images):
    engine = engine_of(llama, DecodingConfig(max_new_tokens=9), **SIZES, is_constrained=True)
    found = written(engine, [Request(i, one, forks=(Fork(allowed_tokens=only_even),)) for i, one in enumerate(images)])
    shared = random_prefixes(llama, 1, 3, seed=2)[0]
    for i, image in enumerate(images):
        [theirs] = transformers_captions(
            llama,
            [image],
            shared_prefix=shared,
            max_new_tokens=9,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, tokens: only_even(tokens.tolist()).nonzero()[:, 0].tolist(),
        )
        assert [one.token_ids for one in found[i].hypotheses] == theirs
