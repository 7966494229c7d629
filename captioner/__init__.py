"""Caption millions of images into a Parquet table: CLIP ViT -> projection -> LLaMA-3, on Ray.

Importing this package loads neither torch nor ray; each room brings what it needs.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


_LAZY = {
    "Caption": "captioner.caption_columns",
    "Captioner": "captioner.captioning.captioner",
    "Reject": "captioner.schema",
    "caption": "captioner.cluster.dataset_captions",
}
"""What `captioner.NAME` gives, and the module that it comes from: type checkers see it there."""


def __getattr__(name: str) -> Any:
    """Return what notebooks use; torch and Ray are imported when it is asked for."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
