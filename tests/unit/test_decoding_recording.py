"""Recorded steps against steps that run as they come."""

import pytest
import torch

from captioner.config import DecodingConfig
from captioner.decoding import Request
from captioner.model.recording import recorder_for
from tests.unit.decoding_models import assert_same_or_tied, captions, engine_of, random_prefixes, tiny_llama, token_ids
from tests.unit.notebook import Notebook

STRATEGIES = [
    {},
    {"min_new_tokens": 3, "repetition_penalty": 1.2},
    {"do_sample": True, "num_captions": 2},
    {"do_sample": True, "top_k": 0, "top_p": 0.9, "min_p": 0.01},
    {"num_beams": 3, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.mark.parametrize("prefix_len", [1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recorded_steps_write_the_captions_of_steps_that_run_as_they_come(llama, strategy, prefix_len):
    images = random_prefixes(llama, 24, prefix_len)
    decoding, recorder = DecodingConfig(max_new_tokens=12, **strategy), Notebook()
    recorded = captions(llama, images, decoding, recorder=recorder, slots=20)
    assert recorder.num_replays > 5
    assert token_ids(recorded) == token_ids(captions(llama, images, decoding, slots=20))


def test_a_recording_is_made_for_every_shape_before_the_first_request(llama):
    recorder = Notebook()
    engine = engine_of(llama, DecodingConfig(max_new_tokens=40), recorder=recorder, prefix_len=3, slots=6)
    num_windows, num_prompt_counts = 3, 5  # 16, 32 and 48 columns; 0, 1, 2, 4 and 6 fresh prefixes
    assert len(recorder.operations) == num_windows * num_prompt_counts
    images = random_prefixes(llama, 30, 3)
    assert len(list(engine.generate(Request(i, image) for i, image in enumerate(images)))) == 30
    assert len(recorder.operations) == num_windows * num_prompt_counts


def test_long_captions_take_no_more_than_nine_windows(llama):
    recorder = Notebook()
    engine_of(llama, DecodingConfig(max_new_tokens=250), recorder=recorder)
    assert 8 <= len(recorder.operations) <= 9


def test_only_a_cuda_device_has_a_recorder():
    assert recorder_for(torch.device("cpu")) is None
    assert recorder_for(torch.device("meta")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("prefix_len", [1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cuda_graphs_write_the_captions_of_eager_steps(strategy, prefix_len):
    llama = tiny_llama().cuda()
    images = [image.cuda() for image in random_prefixes(llama, 50, prefix_len)]
    shared = random_prefixes(llama, 1, 3, seed=2)[0].cuda()
    decoding = DecodingConfig(max_new_tokens=20, **strategy)
    settings = {"slots": 20, "shared_prefix": shared}
    graphs = captions(llama, images, decoding, recorder=recorder_for(llama.device), **settings)
    eager = captions(llama, images, decoding, **settings)
    if strategy:  # 16 or 32 rows against 32, whose last bits differ: at most one caption in fifty may part
        assert sum(mine != other for mine, other in zip(token_ids(graphs), token_ids(eager), strict=True)) <= 1
        return
    cpu, prefixes = llama.cpu(), [torch.cat([shared, image]).cpu() for image in images]
    assert_same_or_tied(cpu, prefixes, graphs, token_ids(eager))
