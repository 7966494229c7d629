"""How many slots fit a device's memory, computed from the sizes of an engine's buffers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import LlamaConfig

from captioner.decoding.layout import ROW_BUCKET, STEP_ROWS, SlotLayout, round_up
from captioner.decoding.stores import head_dim, kv_heads
from captioner.errors import ResourceError

WAITING_PER_SLOT = 2
"""Most encoded images that wait on the device for a slot: twice the slots keep these full while the next images are
encoded."""
_WAITING_TOKENS = 65_536
"""Most tokens of theirs: 0.5 GiB for an 8B model. Twice the longest image wait in any case."""
_HELD_TOKENS = 4 * 64 * 768
"""Tokens of images held beside these. 64 tiles are encoded at a time: some of a batch have not been submitted yet, and
some are computed but share memory with one that is not."""
_MAX_SLOTS, _LEAST_SLOTS = 256, 32
_CPU_SLOTS = 64
"""A 60M model on one core generated 381 tokens a second in float32 with 32 slots, 501 with 64 and 613 with 128; beyond
64 the gain does not outweigh the tail of a small job, in which most slots are idle."""
_USABLE = 0.9
_LOGITS_COPIES = 5
_ACTIVATION_COPIES = 6


def engine_bytes(config: LlamaConfig, layout: SlotLayout, *, item_bytes: int) -> int:
    """Return the bytes of an engine beside the model: keys and values of both stores, float32 logits with their working
    copies, the activations of one step, and the prefixes of images that wait or are being computed."""
    slots, prompt_rows, width = layout.num_slots, layout.prompt_rows, config.hidden_size
    columns = layout.prefix_columns * layout.num_prefixes + layout.own_columns * (slots + 1)
    kv = 2 * config.num_hidden_layers * kv_heads(config) * head_dim(config) * columns
    logits = (_LOGITS_COPIES * 4 + layout.is_constrained) * config.vocab_size * slots
    activations = _ACTIVATION_COPIES * (width + config.intermediate_size) * (slots + prompt_rows)
    prompt_scores = 2 * config.num_attention_heads * prompt_rows * (layout.prefix_columns + layout.own_columns)
    num_prefixes = (1 + WAITING_PER_SLOT) * slots + _HELD_TOKENS // 768
    computed = prompt_rows + 2 * layout.max_prefix_len
    tokens = min(num_prefixes * layout.max_prefix_len, waiting_tokens(layout) + _HELD_TOKENS + computed)
    numbers = slots * (layout.max_new_tokens + 12) + prompt_rows * (1 + layout.group_size)
    return (kv + activations + tokens * width) * item_bytes + logits + prompt_scores * 4 + numbers * 8


def waiting_tokens(layout: SlotLayout) -> int:
    """Return the tokens of waiting images from which on a call waits to submit more."""
    return max(_WAITING_TOKENS, 2 * layout.max_prefix_len)


def fitting_slots(
    free_bytes: int, bytes_of: Callable[[int], int], *, group_size: int, most_slots: int = _MAX_SLOTS
) -> int:
    """Return the most slots that fit nine tenths of the free memory: whole groups, about `most_slots` at most.

    Raises ResourceError if one image's group does not fit."""
    numbers = range(group_size, max(most_slots, group_size) + 1, group_size)
    slots = max((number for number in numbers if bytes_of(number) <= free_bytes * _USABLE), default=0)
    if slots == 0:
        raise ResourceError(
            f"{free_bytes / 2**20:,.0f} MiB are free beside the model, but one image takes "
            f"{bytes_of(group_size) / 2**20:,.0f} MiB (slots needed: {group_size}); lower --max-new-tokens, "
            "--num-beams or --num-captions"
        )
    return slots


def most_useful_slots(layout: SlotLayout) -> int:
    """Return the slots beyond which a GPU gains nothing: a step of fixed size has as many decode rows as an image's
    captions have tokens, in proportion to the image's prompt rows; 64 for 576 image tokens and captions of 64."""
    tokens = layout.max_new_tokens * layout.slots_per_image
    balanced = STEP_ROWS * tokens // (tokens + layout.most_rows_of_image)
    return min(max(round_up(balanced, ROW_BUCKET), _LEAST_SLOTS), _MAX_SLOTS)


def auto_slots(
    config: LlamaConfig,
    layout_of: Callable[[int], SlotLayout],
    device: torch.device,
    dtype: torch.dtype,
    *,
    memory_share: float = 1.0,
) -> int:
    """Return the slots for `--slots auto`: as many as a GPU's free memory holds, on a CPU enough for its throughput.

    memory_share: of what is free, where other engines take the rest."""
    any_layout = layout_of(1)
    group_size = any_layout.slots_per_image
    if device.type != "cuda":
        return max(_CPU_SLOTS // group_size, 1) * group_size

    def bytes_of(slots: int) -> int:
        return engine_bytes(config, layout_of(slots), item_bytes=dtype.itemsize)

    free_bytes = int(_free_bytes(device) * memory_share)
    return fitting_slots(free_bytes, bytes_of, group_size=group_size, most_slots=most_useful_slots(any_layout))


def _free_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device that this process may still allocate, within its memory fraction."""
    torch.cuda.empty_cache()  # blocks that loading the weights left in the cache
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free, share - torch.cuda.memory_reserved(device))


@contextmanager
def name_out_of_memory(slots: int, max_new_tokens: int) -> Iterator[None]:
    """Turn an allocation failure inside the block into a ResourceError that names the options to lower."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise ResourceError(
            f"out of memory with --slots {slots} and --max-new-tokens {max_new_tokens}; lower either"
        ) from error
