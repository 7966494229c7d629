"""The embedded default: a tiny trained bundle, images that it never saw, and the generator of labelled scenes.

Knows where the files are, not who reads them; importing it loads no model code.
"""

from pathlib import Path

__all__ = ["bundle_path", "images_path"]


def bundle_path() -> Path:
    """Return the folder of the demo bundle; its README.md is the model card."""
    return Path(__file__).parent / "bundle"


def images_path() -> Path:
    """Return the folder of the demo images: held-out scenes, one file each."""
    return Path(__file__).parent / "images"
