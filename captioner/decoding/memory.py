"""How many slots a device holds. Arithmetic from the model's geometry; only `free_bytes` asks a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import LlamaConfig

from captioner.config import DecodingConfig
from captioner.decoding.attention import head_dim
from captioner.errors import ResourceError

_MAX_SLOTS = 256
_CPU_SLOTS = 64
"""A 60M model on one core wrote 381 tokens a second in float32 with 32 slots, 501 with 64 and 613 with 128; beyond 64
the gain no longer pays for the tail of a small job."""
_USABLE = 0.9
_LOGITS_COPIES = 5
_ACTIVATION_COPIES = 6


def slot_bytes(config: LlamaConfig, *, item_bytes: int, columns: int, prefix_len: int) -> int:
    """Return what one slot takes, in bytes: keys and values of `columns` tokens, float32 logits with their working
    copies, and the activations of its rows while its prefix of `prefix_len` tokens is read."""
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    kv = 2 * config.num_hidden_layers * kv_heads * head_dim(config) * columns * item_bytes
    logits = _LOGITS_COPIES * config.vocab_size * 4
    activations = _ACTIVATION_COPIES * prefix_len * (config.hidden_size + config.intermediate_size) * item_bytes
    return kv + logits + activations


def fitting_slots(free_bytes: int, bytes_per_slot: int, *, group_size: int) -> int:
    """Return the slots that a tenth less than the free memory holds: whole groups of `group_size`, about 256 at most.

    Raises ResourceError if not even one image's group fits."""
    room = int(free_bytes * _USABLE) // bytes_per_slot
    slots = min(room, max(_MAX_SLOTS, group_size)) // group_size * group_size
    if slots == 0:
        raise ResourceError(
            f"{free_bytes / 2**20:,.0f} MiB are free beside the model, but one image takes "
            f"{group_size * bytes_per_slot / 2**20:,.0f} MiB (slots needed: {group_size}); lower --max-new-tokens, "
            "--num-beams or --num-captions"
        )
    return slots


def auto_slots(
    config: LlamaConfig,
    decoding: DecodingConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shared_len: int,
    prefix_len: int,
    group_size: int,
) -> int:
    """Return the slots for `--slots auto`: what a GPU's free memory holds, on a CPU what fills its matrix products."""
    if device.type != "cuda":
        return max(_CPU_SLOTS // group_size, 1) * group_size
    columns = shared_len + prefix_len + decoding.max_new_tokens
    per_slot = slot_bytes(config, item_bytes=dtype.itemsize, columns=columns, prefix_len=prefix_len)
    return fitting_slots(torch.cuda.mem_get_info(device)[0], per_slot, group_size=group_size)


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
