"""The embedded default: a tiny bundle that was really trained, images that it never saw, and the world of both.

Knows where they lie and nothing of what reads them; importing it loads no model code.
"""

from pathlib import Path

__all__ = ["bundle_path", "images_path"]


def bundle_path() -> Path:
    """The folder of the demo bundle; its README.md is the model card."""
    return Path(__file__).parent / "bundle"


def images_path() -> Path:
    """The folder of the demo images: held-out scenes, one file each."""
    return Path(__file__).parent / "images"
