"""How many slots `--slots auto` takes, and what is said when memory runs out."""

import pytest
import torch
from transformers import LlamaConfig

from captioner.config import DecodingConfig
from captioner.decoding.memory import auto_slots, engine_bytes, fitting_slots, out_of_memory_named
from captioner.decoding.step import SlotLayout
from captioner.errors import ResourceError
from captioner.model.recording import Recording
from tests.unit.decoding_models import engine_of, tiny_llama

LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=32,
    vocab_size=128_256,
)
GREEDY = DecodingConfig(max_new_tokens=64)


def layout_of(slots: int, prefix_len: int = 1, decoding: DecodingConfig = GREEDY) -> SlotLayout:
    return SlotLayout.of(slots, decoding, shared_len=1, prefix_len=prefix_len, is_recorded=True)


@pytest.fixture
def card(monkeypatch):
    """A CUDA device with 80 GiB, of which what a test says is free."""
    asked = []

    def of(free_gib: float, *, share: float = 1.0, reserved_gib: float = 16) -> torch.device:
        sizes = (int(free_gib * 2**30), 80 << 30)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty_cache"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append("mem_get_info") or sizes)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved_gib * 2**30))
        return torch.device("cuda")

    of.asked = asked
    return of


def slots_on(device: torch.device, prefix_len: int = 1) -> int:
    return auto_slots(LLAMA_3_8B, lambda slots: layout_of(slots, prefix_len), 1, device=device, dtype=torch.bfloat16)


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 4}, {"do_sample": True, "num_captions": 3}])
@pytest.mark.parametrize("prefix_len", [1, 40])
@pytest.mark.parametrize("is_recorded", [True, False])
def test_an_engine_takes_no_more_than_was_counted(strategy, prefix_len, is_recorded):
    llama = tiny_llama()
    recorder = (lambda work: Recording(work, work())) if is_recorded else None
    decoding = DecodingConfig(max_new_tokens=60, **strategy)
    engine = engine_of(llama, decoding, prefix_len=prefix_len, slots=20, recorder=recorder)
    model = engine._model
    held = [*vars(model.buffers).values(), *vars(model).values()]
    taken = sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))
    assert model.buffers.kv.nbytes < taken <= engine_bytes(llama.config, model.layout, item_bytes=4)


def test_auto_slots_on_a_cpu_are_whole_groups():
    engine = engine_of(tiny_llama(), DecodingConfig(num_beams=5), slots="auto")
    assert engine.num_slots % 5 == 0
    assert engine.num_slots >= 5


def test_a_card_with_room_gets_256_slots_whatever_the_length_of_a_prefix(card):
    assert slots_on(card(60)) == 256
    assert slots_on(card(60), prefix_len=590) == 256


def test_slots_follow_the_memory_that_is_free(card):
    assert slots_on(card(1)) < slots_on(card(2)) < 256
    for free_gib in (4, 8, 20):
        slots = slots_on(card(free_gib), prefix_len=590)
        taken = engine_bytes(LLAMA_3_8B, layout_of(slots, 590), item_bytes=2)
        assert 0.7 * free_gib < taken / 2**30 <= 0.9 * free_gib


def test_what_loading_left_in_the_cache_counts_as_free(card):
    slots_on(card(60))
    assert card.asked == ["empty_cache", "mem_get_info"]


def test_a_worker_that_shares_its_card_leaves_the_others_their_part(card):
    assert slots_on(card(60, share=0.25, reserved_gib=16), prefix_len=590) == slots_on(card(4), prefix_len=590) < 100


def test_whole_groups_are_taken():
    assert fitting_slots(100, lambda slots: slots, group_size=1) == 90
    assert fitting_slots(100, lambda slots: slots, group_size=4) == 88
    assert fitting_slots(10**6, lambda slots: slots, group_size=1) == 256
    with pytest.raises(ResourceError, match=r"one image takes .*slots needed: 4.*--max-new-tokens"):
        fitting_slots(4, lambda slots: slots, group_size=4)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_names_what_to_lower(error):
    with pytest.raises(ResourceError, match="--slots 64 and --max-new-tokens 32"), out_of_memory_named(64, 32):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_named(64, 32):
        raise RuntimeError("shapes do not match")
