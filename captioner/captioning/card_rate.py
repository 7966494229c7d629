"""How many images a second one card captions, computed from sizes alone: nothing is measured.

An image's tokens are multiplied with the weights of tower and language model, and its caption grows by steps, each of
which reads all weights once for all slots. Of the card's peak for products and of its bandwidth one half counts: what
an engine reaches. Knows numbers alone.
"""

from dataclasses import dataclass

from captioner.model.card import CARD_BYTES_PER_S, CARD_FLOPS

__all__ = ["ImageWork", "images_per_s"]

_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """What one image takes of a card."""

    tower_parameters: int
    tower_tokens: int
    """States of all of its tiles."""

    language_parameters: int
    """Without the table of embeddings, which is looked up."""

    prompt_tokens: int
    """That are computed for each image: those before it are shared."""

    caption_tokens: int
    kv_bytes: float
    """Keys and values that a step reads for one caption."""


def images_per_s(work: ImageWork, slots: int, item_bytes: int) -> float:
    """Return the rate of one card that writes so many captions at once; 0 where it holds none."""
    if not slots:
        return 0.0
    flops, weights_bytes = CARD_FLOPS[item_bytes] * _SHARE, work.language_parameters * item_bytes
    products = work.tower_parameters * work.tower_tokens + work.language_parameters * work.prompt_tokens
    read_s = (weights_bytes / slots + work.kv_bytes) / (CARD_BYTES_PER_S * _SHARE)
    token_s = max(read_s, 2 * work.language_parameters / flops)
    return 1 / (2 * products / flops + work.caption_tokens * token_s)
