"""Half a million captions leave the process as large as a hundred thousand did, which fill the pools of allocators."""

import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from captioner.config import DecodingConfig
from captioner.decoding import Request
from tests.unit.decoding.decoding_models import engine_of, tiny_llama

MARKS = (100_000, 500_000)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def sizes_after() -> dict[int, int]:
    """Return the bytes of this process after so many captions each."""
    torch.set_num_threads(1)
    llama = tiny_llama(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    engine = engine_of(llama, DecodingConfig(max_new_tokens=4), slots=256)
    generator = torch.Generator().manual_seed(1)

    def requests() -> Iterator[Request]:
        for number in range(500_000):
            yield Request(number, torch.randn(1, 16, generator=generator))

    return {number: resident_bytes() for number, _ in enumerate(engine.generate(requests()), 1) if number in MARKS}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_half_a_million_captions_leave_the_process_as_large_as_a_hundred_thousand():
    """In a process of its own: this one's grows and shrinks by what other tests left."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        sizes = fresh.submit(sizes_after).result()
    assert sorted(sizes) == sorted(MARKS)
    assert sizes[500_000] - sizes[100_000] < 4 << 20
