"""Flags for fetching and decoding an image."""

from dataclasses import dataclass

from captioner.config.checks import DAY_S, check, flag_name

__all__ = ["ImageConfig"]


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How images are fetched and decoded, and which are rejected."""

    max_image_bytes: int = 64 << 20
    """Largest image file to fetch, in bytes; a larger one is rejected as `too_large`."""

    max_image_pixels: int = 100_000_000
    """Largest image to decode, in pixels; a larger one is rejected as `too_many_pixels` (decompression bombs)."""

    decode_timeout_s: float = 20.0
    """Longest time to decode one image, in seconds."""

    fetch_timeout_s: float = 60.0
    """Longest time to fetch one image, retries included, in seconds."""

    fetch_retries: int = 4
    """Retries of a throttled, reset or timed-out fetch, with growing pauses."""

    fetch_concurrency: int = 32
    """Images that one CPU worker fetches at the same time."""

    fast_decode: bool = False
    """Decode JPEGs at the smallest scale of 1.5 times the model's side or more: faster, but pixels differ more."""

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_image_pixels", "fetch_concurrency"):
            check(getattr(self, name) > 0, flag_name(name), getattr(self, name), "more than 0")
        for name in ("decode_timeout_s", "fetch_timeout_s"):
            is_time = 0 < getattr(self, name) <= DAY_S
            check(is_time, flag_name(name), getattr(self, name), f"more than 0, at most {DAY_S} (a day)")
        check(self.fetch_retries >= 0, "--fetch-retries", self.fetch_retries, "0 or more")
