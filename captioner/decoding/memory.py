"""How many slots a device holds: arithmetic from the sizes that an engine's buffers are made to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import LlamaConfig

from captioner.decoding.attention import head_dim
from captioner.decoding.step import SlotLayout
from captioner.errors import ResourceError

WAITING_PER_SLOT = 2
"""Encoded images that wait on the device for a slot, at most: twice as many as slots keep these full while the next are
encoded, and LLaVA's take 5 MB each."""
_HELD_PREFIXES = 4 * 64
"""Beyond these, of those encoded 64 at a time: some for which there was no room, and some that have no other use than
to lie beside one that is still read."""
_MAX_SLOTS = 256
_CPU_SLOTS = 64
"""A 60M model on one core wrote 381 tokens a second in float32 with 32 slots, 501 with 64 and 613 with 128; beyond 64
the gain no longer pays for the tail of a small job."""
_USABLE = 0.9
_LOGITS_COPIES = 5
_ACTIVATION_COPIES = 6


def engine_bytes(config: LlamaConfig, layout: SlotLayout, *, item_bytes: int) -> int:
    """Return what an engine takes beside the model, in bytes: keys and values of all slots and the spare one, float32
    logits with their working copies, the activations of one step, and the prefixes of seated and waiting images."""
    slots, prompt_rows = layout.num_slots, layout.max_prompts * (layout.prefix_len - 1)
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    kv = 2 * config.num_hidden_layers * kv_heads * head_dim(config) * layout.num_columns * (slots + 1)
    logits = _LOGITS_COPIES * config.vocab_size * slots
    activations = _ACTIVATION_COPIES * (config.hidden_size + config.intermediate_size) * (slots + prompt_rows)
    prompt_scores = 2 * config.num_attention_heads * prompt_rows * layout.first_column
    prefixes = ((1 + WAITING_PER_SLOT) * slots + _HELD_PREFIXES) * layout.prefix_len * config.hidden_size
    history = slots * (layout.max_new_tokens + 8)
    return (kv + activations + prefixes) * item_bytes + (logits + prompt_scores) * 4 + history * 8


def fitting_slots(free_bytes: int, bytes_of: Callable[[int], int], *, group_size: int) -> int:
    """Return the most slots whose bytes are a tenth less than the free memory: whole groups, about 256 at most.

    Raises ResourceError if not even one image's group fits."""
    numbers = range(group_size, max(_MAX_SLOTS, group_size) + 1, group_size)
    slots = max((number for number in numbers if bytes_of(number) <= free_bytes * _USABLE), default=0)
    if slots == 0:
        raise ResourceError(
            f"{free_bytes / 2**20:,.0f} MiB are free beside the model, but one image takes "
            f"{bytes_of(group_size) / 2**20:,.0f} MiB (slots needed: {group_size}); lower --max-new-tokens, "
            "--num-beams or --num-captions"
        )
    return slots


def auto_slots(
    config: LlamaConfig,
    layout_of: Callable[[int], SlotLayout],
    group_size: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Return the slots for `--slots auto`: what a GPU's free memory holds, on a CPU what fills its matrix products."""
    if device.type != "cuda":
        return max(_CPU_SLOTS // group_size, 1) * group_size

    def bytes_of(slots: int) -> int:
        return engine_bytes(config, layout_of(slots), item_bytes=dtype.itemsize)

    return fitting_slots(_free_bytes(device), bytes_of, group_size=group_size)


def _free_bytes(device: torch.device) -> int:
    """Return what this process may still take of a CUDA device: of its share, if it shares the card."""
    torch.cuda.empty_cache()  # what loading the weights has left behind
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free, share - torch.cuda.memory_reserved(device))


@contextmanager
def out_of_memory_named(slots: int, max_new_tokens: int) -> Iterator[None]:
    """Turn an allocator's failure inside the block into a ResourceError that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise ResourceError(
            f"out of memory with --slots {slots} and --max-new-tokens {max_new_tokens}; lower either"
        ) from error
