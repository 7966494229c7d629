"""What a model takes of a GPU's memory, and which cards hold it with how many slots: computed, nothing is loaded.

From configs and headers of weights alone. The engine's part is that of `--slots auto`; CUDA graphs and the fragments of
its allocator are in the tenth that this leaves free.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from captioner.captioning.job import resolve
from captioner.captioning.plan import describe_model
from captioner.config import PlanConfig
from captioner.errors import ResourceError
from captioner.model.description import BundleDescription
from captioner.terminal import say

__all__ = ["CARDS", "model_capacity"]

CARDS = (24, 48, 80)
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
    return {
        "model": model.name,
        "is_computed": True,
        "image_tokens": model.num_image_tokens,
        "prompt_tokens": model.num_prompt_tokens,
        "weights_bytes": weights,
        "encode_bytes": encode,
        "kv_bytes_per_token": kv_bytes,
        "kv_bytes_per_slot": kv_bytes * (layout.prefix_columns // layout.slots_per_image + layout.own_columns),
        "slots": {str(gib): _slots(model, config, gib * _GIB - _CUDA_BYTES - weights - encode) for gib in CARDS},
    }


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


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
