"""Tokenizers, as their tokenizer.json has them.

Knows no model. Always transformers' plain fast class: a class of a model may rebuild parts of what the file says.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerFast

from captioner.errors import BundleError
from captioner.model.folder import Folder

__all__ = ["read_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read_tokenizer(folder: Folder) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder. Raises BundleError if there is none, or it cannot be read."""
    if not folder.has("tokenizer.json"):
        raise BundleError(
            f"{folder.name} has no tokenizer: expected tokenizer.json, as tokenizer.save_pretrained(folder) writes it"
        )
    with _copy(folder) as path:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer


@contextmanager
def _copy(folder: Folder) -> Iterator[str]:
    """Give a local folder with only the tokenizer's files, so that nothing else beside them can matter."""
    with TemporaryDirectory() as path:
        for name in _FILES:
            if folder.has(name):
                (Path(path) / name).write_bytes(folder.read(name))
        yield path
