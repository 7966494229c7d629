"""Seeds of draws: a function of the job's seed and a name, the same wherever and whenever."""

import hashlib

__all__ = ["image_seed"]


def image_seed(seed: int, image_id: str) -> int:
    """Return the int64 seed of an image's draws: the same wherever and whenever it is captioned."""
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
