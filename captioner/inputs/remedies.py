"""What to do with an INPUT that is none: how a path, a folder or a text that was meant otherwise is to be given.

Knows names and first lines; opens no store.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from captioner.errors import InputError
from captioner.inputs.suffixes import IMAGE_SUFFIXES

__all__ = ["check_is_list", "first_lines", "for_folder_without_images", "for_missing_path"]

_WINDOWS = re.compile(r"(?:^|/)([A-Za-z]):(?:[\\/]+|$)(.*)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NUM_LINES = 20  # of a text that are looked at


def for_missing_path(url: str, folder: Path | None = None) -> str:
    """Return a remedy for a path that does not exist, as the end of a message; empty where none is known.

    folder: that relative paths are taken from, by default the current one."""
    if found := _WINDOWS.search(url):
        drive, below = found.group(1).lower(), found.group(2).replace("\\", "/")
        return f". A path of Windows is /mnt/{drive}/{below} under WSL"
    relative = url.removeprefix(f"{folder or Path.cwd()}/")
    is_like_hub = _HUB_NAME.fullmatch(relative) and not Path(url).parent.exists() and not relative.startswith(".")
    if is_like_hub and Path(relative).suffix.lower() not in IMAGE_SUFFIXES:
        return f". A data set of the Hugging Face hub is read as hf://datasets/{relative}"
    return ""


def for_folder_without_images(shown: str, suffixes: Mapping[str, int]) -> str:
    """Return a remedy for a folder that holds files of other kinds, as the end of a message.

    suffixes: how many files there are of each suffix."""
    if ".arrow" in suffixes:
        return (
            f"; what datasets' save_to_disk writes becomes Parquet by datasets.load_from_disk({shown!r})"
            '.to_parquet("images.parquet"), of a DatasetDict one split at a time'
        )
    return "; pass --input-format files to take all, or list to read URIs from them"


def check_is_list(lines: Sequence[str], where: str) -> None:
    """Raise InputError for the first lines of a text that is no list of URIs: a log, prose."""
    texts = [line.strip() for line in lines if line.strip()]
    if texts and all(map(_is_prose, texts)):
        raise InputError(
            f"{where}, line 1: {texts[0][:60]!r} is no URI of an image; expected one URI a line. A log is no list, and"
            " a table of URIs is a .csv with a header"
        )


def first_lines(lines: Iterator[str]) -> list[str]:
    """Return the lines by which `check_is_list` decides."""
    return [line for _, line in zip(range(_NUM_LINES), lines, strict=False)]


def _is_prose(text: str) -> bool:
    """Return whether a line has several words, and is neither a URL nor the name of an image."""
    is_uri = "://" in text.split()[0] or any(text.lower().endswith(suffix) for suffix in IMAGE_SUFFIXES)
    return len(text.split()) > 2 and not is_uri
