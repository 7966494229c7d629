"""Which prompt rows a step computes: first come, first served, and never too many."""

import pytest

from captioner.config import DecodingConfig
from captioner.decoding import EngineThread, Request
from captioner.decoding.attention import TransformersLayers
from captioner.decoding.cuda.fused_llama import FusedLlama
from captioner.decoding.cuda.operations import PlainOperations
from captioner.decoding.layout import SlotLayout
from captioner.decoding.memory import waiting_tokens
from captioner.decoding.plan import alike
from tests.unit.decoding.decoding_models import engine_of, random_prefixes, tiny_llama


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(max_position_embeddings=4096, num_hidden_layers=1)


class Watched:
    """Layers that note the rows of each step."""

    def __init__(self, layers):
        self.blocks, self._layers = layers.blocks, layers
        self.steps = []

    def __call__(self, embeds, positions, view):
        self.steps.append((view.num_rows, len(embeds) - view.num_rows))
        return self._layers(embeds, positions, view)


@pytest.mark.parametrize(("is_on_a_card", "most_rows", "most_steps"), [(False, 1024, 3), (True, 496, 6)])
def test_a_long_image_comes_in_chunks_beside_the_captions_that_run(llama, is_on_a_card, most_rows, most_steps):
    layers = Watched(FusedLlama(llama, PlainOperations()) if is_on_a_card else TransformersLayers(llama))
    decoding = DecodingConfig(max_new_tokens=12)
    engine = engine_of(llama, decoding, layers=layers, eos_token_ids=(), max_prefix_len=2880, slots=4)
    long, short = (random_prefixes(llama, 1, length)[0] for length in (2880, 5))
    engine.admit([Request("short", short)])
    engine.step()
    layers.steps.clear()
    engine.admit([Request("long", long)])
    done = []
    while not engine.is_idle:
        done += [(generation.id, len(layers.steps)) for generation in engine.step()]
    rows = [prompt_rows for _, prompt_rows in layers.steps if prompt_rows]
    assert len(rows) == most_steps
    assert max(rows) <= most_rows
    assert 2879 <= sum(rows) < 2879 + 16 + 2
    assert done == [("short", 11), ("long", most_steps + 11)], "a token in every step"


def test_the_blocks_of_a_step_are_grouped_once_for_all_layers(monkeypatch):
    llama = tiny_llama(num_hidden_layers=3)
    groupings = []

    def grouped(blocks):
        groupings.append([len(group) for group in alike(blocks)])
        return alike(blocks)

    monkeypatch.setattr("captioner.decoding.engine.alike", grouped)
    layers = Watched(TransformersLayers(llama))
    engine = engine_of(llama, DecodingConfig(max_new_tokens=1), layers=layers, max_prefix_len=90, slots=8)
    lengths = (20, 20, 20, 30, 80, 80)
    images = [Request(str(i), random_prefixes(llama, 1, length)[0]) for i, length in enumerate(lengths)]
    assert len(list(engine.generate(images))) == len(images)
    assert len(groupings) == len(layers.steps)
    assert groupings[0] == [3, 1, 1, 1, 1, 1], "short ones of a length together; 80 are blocks of 64 and of 15 rows"


def test_short_images_share_a_step_and_one_token_waits_for_no_image(llama):
    layers = Watched(TransformersLayers(llama))
    engine = engine_of(
        llama, DecodingConfig(max_new_tokens=1), layers=layers, eos_token_ids=(), max_prefix_len=1500, slots=8
    )
    lengths = (1500, 400, 300, 200, 1)
    waiting = [Request(i, random_prefixes(llama, 1, length)[0]) for i, length in enumerate(lengths)]
    ids = []
    while waiting or not engine.is_idle:
        while waiting and engine.num_free:
            engine.admit([waiting.pop()])  # the single token first, the longest last
        ids.append([generation.id for generation in engine.step()])
    assert [sorted(done) for done in ids] == [[1, 2, 3, 4], [], [0]]
    assert [rows for _, rows in layers.steps] == [962, 1024, 412]


def test_no_more_prompts_are_admitted_than_the_next_steps_compute(llama):
    engine = engine_of(llama, DecodingConfig(max_new_tokens=4), max_prefix_len=2880, slots=16)
    images = random_prefixes(llama, 3, 600)
    for image in images[:2]:
        assert engine.num_free == 1
        engine.admit([Request(0, image)])
    assert engine.num_free == 0, "1,198 rows wait, and a step takes 1,024"
    engine.step()
    assert engine.num_free == 1


def test_a_call_waits_while_many_tokens_wait(llama, monkeypatch):
    engine = engine_of(llama, DecodingConfig(max_new_tokens=4), max_prefix_len=200, slots=2)
    monkeypatch.setattr("captioner.decoding.engine.waiting_tokens", lambda layout: 300)
    assert waiting_tokens(engine._model.layout) > 300
    thread = EngineThread(engine)
    most = []

    def submit(image):
        futures.extend(thread.submit([Request(0, image)]))
        most.append(thread._num_waiting_tokens)

    futures = []
    for image in random_prefixes(llama, 12, 200):
        submit(image)
    for future in futures:
        future.result(timeout=60)
    thread.close()
    assert max(most) <= 300 + 200
    assert thread._num_waiting_tokens == 0


def test_slots_on_a_card_leave_the_most_rows_to_prompts():
    def rows_of(slots, most):
        layout = SlotLayout.of(slots, DecodingConfig(), shared_len=1, max_prefix_len=most, blocks=FusedLlama.blocks)
        return layout.num_slots, layout.prompt_rows

    assert rows_of(64, 2880) == (64, 448)
    assert rows_of(256, 577) == (256, 256)
    assert rows_of(256, 1) == (256, 0)
    assert rows_of(600, 577) == (608, 128)
