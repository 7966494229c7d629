"""What a model takes of a GPU's memory, which cards hold it with how many slots, and one's rate and price: computed.

From configs and headers of weights alone. The engine's part is that of `--slots auto`; CUDA graphs and the fragments of
its allocator are in the tenth that this leaves free.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from captioner.captioning.card_rate import ImageWork, images_per_s
from captioner.captioning.job import resolve
from captioner.captioning.plan import describe_model
from captioner.config import PlanConfig
from captioner.errors import ResourceError
from captioner.model.card import CARD, CARD_GIB
from captioner.model.description import BundleDescription
from captioner.terminal import say

__all__ = ["CARDS", "model_capacity"]

CARDS = (24, 48, CARD_GIB)
"""Memory of common cards, in GiB."""

_GIB = 1 << 30
_CUDA_BYTES = _GIB
"""What CUDA's own context, its libraries and the driver take."""

_ITEM_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
_TOWER_COPIES = 6
"""Tensors of the tower's width that a layer holds at the same time, beside two of the inner width."""


def model_capacity(config: PlanConfig) -> Mapping[str, Any]:
    """Return what the model of a job takes and which cards hold it. Raises UsageError for what a job would refuse."""
    job = resolve(config.job)
    model = describe_model(job.config.model)
    job.check_model(model)
    summary = _summary(model, config)
    say(_lines(model, summary))
    return summary


def _summary(model: BundleDescription, config: PlanConfig) -> dict[str, Any]:
    item_bytes = _ITEM_BYTES[config.model.dtype]
    weights = (model.clip_parameters + model.projector_parameters + model.llama_parameters) * item_bytes
    encode = _encode_bytes(model, item_bytes)
    kv_bytes = model.language_config.kv_values * item_bytes
    layout = _layout_of_one(model, config)
    slots = {str(gib): _slots(model, config, gib * _GIB - _CUDA_BYTES - weights - encode) for gib in CARDS}
    rate = images_per_s(_image_work(model, config, kv_bytes), slots[str(CARD_GIB)], item_bytes)
    hourly = config.gpu_hourly
    return {
        "model": model.name,
        "is_computed": True,
        "image_tokens": model.num_image_tokens,
        "prompt_tokens": model.num_prompt_tokens,
        "weights_bytes": weights,
        "encode_bytes": encode,
        "kv_bytes_per_token": kv_bytes,
        "kv_bytes_per_slot": kv_bytes * (layout.prefix_columns // layout.slots_per_image + layout.own_columns),
        "slots": slots,
        "images_per_s": round(rate, 1),
        "price_per_million": round(hourly * 1e6 / rate / 3600, 2) if rate and hourly is not None else None,
    }


def _image_work(model: BundleDescription, config: PlanConfig, kv_bytes: int) -> ImageWork:
    """Return what the largest image takes with the longest captions."""
    tiles = model.anyres.most_image_tiles if model.anyres else 1
    prompt = model.num_prompt_tokens - model.num_prompt_tokens_before + model.num_image_tokens
    language = model.language_config
    read_tokens = (model.num_prompt_tokens_before + prompt) + config.decoding.max_new_tokens / 2
    return ImageWork(
        tower_parameters=model.clip_parameters,
        tower_tokens=tiles * (model.tower_config.num_patches + 1),
        language_parameters=model.llama_parameters - language.vocab_size * language.hidden_size,
        prompt_tokens=prompt,
        caption_tokens=_layout_of_one(model, config).slots_per_image * config.decoding.max_new_tokens,
        kv_bytes=read_tokens * kv_bytes,
    )


def _encode_bytes(model: BundleDescription, item_bytes: int) -> int:
    """Return the bytes of the pixels and states of the images that a GPU encodes together."""
    from captioner.model.image_encoder import ENCODE_ROWS  # here and below: what is refused needs no torch

    tower, rows = model.tower_config, ENCODE_ROWS["cuda"]
    widths = _TOWER_COPIES * tower.hidden_size + 2 * tower.intermediate_size
    pixels = 3 * tower.image_size**2 * (1 + 4 + item_bytes)  # uint8, float32, and the tower's own
    return rows * ((tower.num_patches + 1) * widths * item_bytes + pixels)


def _layout(model: BundleDescription, config: PlanConfig, slots: int) -> Any:
    from captioner.decoding.layout import PROMPT_TILES, SlotLayout

    shared = model.num_prompt_tokens_before
    prefix = model.num_prompt_tokens + model.num_image_tokens - shared
    return SlotLayout.of(slots, config.decoding, shared_len=shared, max_prefix_len=prefix, blocks=PROMPT_TILES)


def _layout_of_one(model: BundleDescription, config: PlanConfig) -> Any:
    """Return the layout of the fewest slots: those of one image."""
    from captioner.decoding.layout import group_size

    return _layout(model, config, group_size(config.decoding))


def _slots(model: BundleDescription, config: PlanConfig, free_bytes: int) -> int:
    """Return the slots that fit beside the model, 0 for none."""
    from captioner.decoding.memory import engine_bytes, fitting_slots, most_useful_slots

    language: Any = model.language_config  # it has the values of transformers' own that are read there
    item_bytes, one = _ITEM_BYTES[config.model.dtype], _layout_of_one(model, config)

    def bytes_of(slots: int) -> int:
        return engine_bytes(language, _layout(model, config, slots), item_bytes=item_bytes)

    try:
        return fitting_slots(
            max(free_bytes, 0),
            bytes_of,
            group_size=one.slots_per_image,
            most_slots=most_useful_slots(one),
        )
    except ResourceError:
        return 0


def _lines(model: BundleDescription, summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the summary as people read it."""
    yield f"model     {model.summary}"
    yield f"prompt    {' '.join(model.prompt_tokens)}"
    yield (
        f"memory    weights {_gb(summary['weights_bytes'])}, encoding {_gb(summary['encode_bytes'])}, KV cache "
        f"{summary['kv_bytes_per_token'] / 1000:,.0f} kB a token, {summary['kv_bytes_per_slot'] / 1e6:,.0f} MB a slot"
    )
    held = (f"{gib} GiB: {f'{slots} slots' if slots else 'does not fit'}" for gib, slots in summary["slots"].items())
    yield f"cards     {', '.join(held)} (computed, not measured)"
    if rate := summary["images_per_s"]:
        price = summary["price_per_million"]
        costs = "--gpu-hourly tells the price" if price is None else f"{price:,.2f} a million"
        yield f"rate      {rate:,.1f} images/s on one {CARD}, {costs} (computed at half of its peak, not measured)"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
