"""The table of layouts, and how a folder is read as a checkpoint of one."""

from collections.abc import Mapping
from typing import Any

from captioner.model.language.table import language_supported
from captioner.model.layouts.layout import Layout
from captioner.model.layouts.llava import LLAVA
from captioner.model.layouts.llava_tiles import LLAVA_NEXT, LLAVA_ONEVISION
from captioner.model.layouts.original import ORIGINAL
from captioner.model.towers.table import towers_supported

__all__ = ["LAYOUTS", "layout_of", "supported"]

LAYOUTS: list[Layout] = [LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, ORIGINAL]
"""Layouts; at most one matches a config.json."""


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """Return the layout of a config.json, None for one of no published captioner."""
    return next((layout for layout in LAYOUTS if layout.matches(config)), None)


def supported() -> str:
    """Return what checkpoints can be, for people."""
    *others, last = (layout.name for layout in LAYOUTS)
    return f"{', '.join(others)} or {last} over {towers_supported()} and {language_supported()}"
