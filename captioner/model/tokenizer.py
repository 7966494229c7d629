"""Tokenizers, exactly as in their tokenizer.json.

Knows no model. `read_tokenizer` needs neither torch nor transformers for the tokenizers that people save;
`load_tokenizer` returns transformers' generic fast class, never the class of a model, which may rebuild parts of the
file.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import tokenizers

from captioner.errors import BundleError
from captioner.model.folder import Folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Tokenizer", "load_tokenizer", "read_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
# fmt: off
_NO_EFFECT = frozenset({
    "add_bos_token", "add_eos_token", "backend", "chat_template", "clean_up_tokenization_spaces", "is_local",
    "legacy", "local_files_only", "model_input_names", "model_max_length", "name_or_path", "padding_side",
    "processor_class", "tokenizer_class", "truncation_side",
})
# fmt: on
"""Entries of tokenizer_config.json that do not change the tokenizer of a tokenizer.json."""


@dataclass(frozen=True)
class TokenIds:
    """The tokens of one text, or of each of several."""

    input_ids: Any


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the names of its start and end token; its methods are called as those of transformers."""

    backend_tokenizer: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool) -> TokenIds:
        """Return the tokens of one text, or of each of several, neither cut nor padded."""
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        if isinstance(text, str):
            return TokenIds(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        found = self.backend_tokenizer.encode_batch(list(text), add_special_tokens=add_special_tokens)
        return TokenIds([one.ids for one in found])

    @property
    def bos_token_id(self) -> int | None:
        """The start token, None without one."""
        return self.convert_tokens_to_ids(self.bos_token) if self.bos_token else None

    @property
    def eos_token_id(self) -> int | None:
        """The end token, None without one."""
        return self.convert_tokens_to_ids(self.eos_token) if self.eos_token else None

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Return the id of a token, None of an unknown one."""
        found: int | None = self.backend_tokenizer.token_to_id(token)
        return found

    def text_of(self, token_id: int) -> str:
        """Return what a token says; for one that is a part of a letter, its name in the vocabulary."""
        text = str(self.backend_tokenizer.decode([token_id], skip_special_tokens=False))
        name = self.backend_tokenizer.id_to_token(token_id)
        if text and "\ufffd" not in text:
            return text
        return str(name)

    def token(self, token_id: int) -> str | None:
        """Return the name of a token in the vocabulary, None of an unknown one."""
        name: str | None = self.backend_tokenizer.id_to_token(token_id)
        return name

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the tokens that were added to the model's own, special ones among them."""
        return dict(self._added)

    @cached_property
    def _added(self) -> dict[str, int]:
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(added.items())}


def read_tokenizer(folder: Folder) -> Tokenizer:
    """Return the tokenizer of a folder. Raises BundleError if there is none, or it cannot be read."""
    _check(folder)
    settings = _settings(folder)
    if settings is not None:
        backend = _backend(folder)
        if _is_unchanged_by(settings, backend):
            return Tokenizer(backend, _content(settings.get("bos_token")), _content(settings.get("eos_token")))
    found = load_tokenizer(folder)
    return Tokenizer(found.backend_tokenizer, _text(found.bos_token), _text(found.eos_token))


def load_tokenizer(folder: Folder) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a folder as transformers' class. Raises BundleError if there is none."""
    from transformers import PreTrainedTokenizerFast  # here, not above: it takes a second

    _check(folder)
    with _copy(folder) as path:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer


def _check(folder: Folder) -> None:
    if not folder.has("tokenizer.json"):
        raise BundleError(
            f"{folder.name} has no tokenizer: expected tokenizer.json, as tokenizer.save_pretrained(folder) writes it"
        )


@contextmanager
def _copy(folder: Folder) -> Iterator[str]:
    """Yield a local folder with only the tokenizer's files, so that no other file has an effect."""
    with TemporaryDirectory() as path:
        for name in _FILES:
            if folder.has(name):
                (Path(path) / name).write_bytes(folder.read(name))
        yield path


def _backend(folder: Folder) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(folder.read("tokenizer.json"))
    except ValueError as error:
        raise BundleError(f"{folder.name}/tokenizer.json is not a tokenizer: {error}") from error


def _settings(folder: Folder) -> dict[str, Any] | None:
    """Return what the files beside tokenizer.json say, None where only transformers knows what they mean."""
    if folder.has("added_tokens.json"):
        return None
    settings = folder.read_json_if_any("tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= folder.read_json_if_any("special_tokens_map.json")
    return settings


def _is_unchanged_by(settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> bool:
    """Whether transformers would use the tokenizer as it is: every token that is named is there, as it is named."""
    if backend.post_processor is None or backend.padding is not None:
        return False
    if set(settings) - _NO_EFFECT - {*_NAMED_TOKENS, *_MORE_TOKENS, "added_tokens_decoder"}:
        return False
    added = {number: _flags(token) for number, token in backend.get_added_tokens_decoder().items()}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        if not isinstance(token, dict) or added.get(int(number)) != _flags(tokenizers.AddedToken(**token)):
            return False
    named = [settings[name] for name in _NAMED_TOKENS if settings.get(name) is not None]
    for name in _MORE_TOKENS:
        more = settings.get(name) or []
        if not isinstance(more, list):
            return False
        named += more
    known = {content for content, *_ in added.values()}
    return all(_content(token) in known for token in named)


def _flags(token: tokenizers.AddedToken) -> tuple[object, ...]:
    return token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special


def _content(token: Any) -> str | None:
    """Return the text of a token, which a file holds as it is or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _text(token: Any) -> str | None:
    return None if token is None else str(token)
