"""How many slots `--slots auto` allocates, and the message when memory runs out."""

import pytest
import torch
from transformers import LlamaConfig

from captioner.config import DecodingConfig
from captioner.decoding.layout import PROMPT_TILES, SlotLayout
from captioner.decoding.memory import auto_slots, engine_bytes, fitting_slots, name_out_of_memory
from captioner.errors import ResourceError
from tests.unit.decoding.decoding_models import engine_of, strategy_of, tiny_llama

LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=32,
    vocab_size=128_256,
)
GREEDY = DecodingConfig(max_new_tokens=64)


def layout_of(slots: int, max_prefix_len: int = 1, decoding: DecodingConfig = GREEDY) -> SlotLayout:
    return SlotLayout.of(slots, decoding, shared_len=1, max_prefix_len=max_prefix_len, blocks=PROMPT_TILES)


@pytest.fixture
def card(monkeypatch):
    """A CUDA device with 80 GiB, of which a test says how many are free."""
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


def slots_on(device: torch.device, max_prefix_len: int = 1, memory_share: float = 1.0) -> int:
    def layouts(slots: int) -> SlotLayout:
        return layout_of(slots, max_prefix_len)

    return auto_slots(LLAMA_3_8B, layouts, device, torch.bfloat16, memory_share=memory_share)


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 4}, {"do_sample": True, "num_captions": 3}])
@pytest.mark.parametrize("more", [{}, {"num_forks": 3, "max_suffix_len": 20, "is_constrained": True}])
@pytest.mark.parametrize("max_prefix_len", [1, 40, 400])
def test_the_buffers_of_an_engine_take_no_more_bytes_than_engine_bytes_says(strategy, more, max_prefix_len):
    llama, decoding = tiny_llama(), DecodingConfig(max_new_tokens=60, **strategy)
    model, _ = strategy_of(llama, decoding, max_prefix_len=max_prefix_len, slots=20, **more)
    held = [*vars(model.buffers).values(), *vars(model).values()]
    stores = model.buffers.stores.prefixes.nbytes + model.buffers.stores.own.nbytes
    taken = stores + sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))
    assert stores < taken <= engine_bytes(llama.config, model.layout, item_bytes=4)


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 4}, {"do_sample": True, "num_captions": 3}])
@pytest.mark.parametrize("more", [{}, {"num_forks": 3, "max_suffix_len": 20}])
@pytest.mark.parametrize("max_prefix_len", [40, 400])
def test_columns_of_a_slot_are_the_same_whatever_the_number_of_slots(strategy, more, max_prefix_len):
    def columns(slots):
        decoding = DecodingConfig(max_new_tokens=60, **strategy)
        layout = SlotLayout.of(
            slots, decoding, shared_len=1, max_prefix_len=max_prefix_len, blocks=PROMPT_TILES, **more
        )
        assert layout.stores_prefixes == (max_prefix_len == 400)
        assert layout.num_prefixes == (layout.num_images if layout.stores_prefixes else 0)
        return layout.prefix_columns, layout.own_columns, layout.most_rows_of_image

    assert columns(1) == columns(12) == columns(64)


def test_auto_slots_on_a_cpu_are_whole_groups():
    engine = engine_of(tiny_llama(), DecodingConfig(num_beams=5), slots="auto")
    assert engine.num_slots % 5 == 0
    assert engine.num_slots >= 5


def test_a_gpu_with_enough_memory_gets_the_slots_that_balance_prompts_and_captions(card):
    assert [slots_on(card(60), tokens) for tokens in (1, 64, 577, 2880)] == [256, 256, 64, 32]


@pytest.mark.parametrize(
    ("card_gib", "most", "expected"), [(24, 2880, 13), (48, 2880, 32), (80, 2880, 32), (24, 577, 64)]
)
def test_an_8b_model_and_its_longest_images_fit_cards_of_24_48_and_80_gib(card, card_gib, most, expected):
    weights_gib = 15.0
    assert slots_on(card(card_gib * 0.97 - weights_gib), most) == expected


def test_slots_follow_the_memory_that_is_free(card):
    assert slots_on(card(1)) < slots_on(card(2)) < 256
    for free_gib in (4, 6, 7):
        slots = slots_on(card(free_gib), 590)
        taken = engine_bytes(LLAMA_3_8B, layout_of(slots, 590), item_bytes=2)
        assert 0.7 * free_gib < taken / 2**30 <= 0.9 * free_gib


def test_memory_that_loading_left_in_the_cache_counts_as_free(card):
    slots_on(card(60))
    assert card.asked == ["empty_cache", "mem_get_info"]


def test_a_worker_that_shares_its_gpu_takes_its_share_only(card):
    assert slots_on(card(60, share=0.25, reserved_gib=16), 590) == slots_on(card(4), 590) < 64


def test_whole_groups_are_taken():
    assert fitting_slots(100, lambda slots: slots, group_size=1) == 90
    assert fitting_slots(100, lambda slots: slots, group_size=4) == 88
    assert fitting_slots(10**6, lambda slots: slots, group_size=1) == 256
    with pytest.raises(ResourceError, match=r"one image takes .*slots needed: 4.*--max-new-tokens"):
        fitting_slots(4, lambda slots: slots, group_size=4)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_names_the_options_to_lower(error):
    with pytest.raises(ResourceError, match="--slots 64 and --max-new-tokens 32"), name_out_of_memory(64, 32):
        raise error


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="shapes"), name_out_of_memory(64, 32):
        raise RuntimeError("shapes do not match")
