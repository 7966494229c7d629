"""The card that computed rates and prices are of: one H100. Knows its numbers, not what is computed from them."""

__all__ = ["CARD", "CARD_BYTES_PER_S", "CARD_FLOPS", "CARD_GIB"]

CARD = "H100 of 80 GB"
CARD_GIB = 80
CARD_BYTES_PER_S = 3.35e12
CARD_FLOPS = {2: 989e12, 4: 67e12}
"""Bytes of a number -> operations a second: bfloat16 by its tensor cores, float32 without them."""
