"""The table of language models, and how a folder is read as one of them.

A new family is a file beside this one and an entry here; one from outside the package is set in `LANGUAGE_MODELS` by
its user."""

from collections.abc import Mapping
from typing import Any

from captioner.errors import BundleError
from captioner.model.configs import check_not_quantized
from captioner.model.folder import Folder
from captioner.model.language.language import LanguageConfig, LanguageFamily, LanguageSource, end_tokens
from captioner.model.language.llama import LLAMA
from captioner.model.language.mistral import MISTRAL
from captioner.model.language.qwen2 import QWEN2
from captioner.model.tokenizer import read_tokenizer
from captioner.model.weights import read_weights

__all__ = ["LANGUAGE_MODELS", "can_fuse", "language_config", "language_supported", "read_language"]

LANGUAGE_MODELS: dict[str, LanguageFamily] = {family.config.model_type: family for family in (LLAMA, MISTRAL, QWEN2)}
"""Families of language models by their model_type."""


def language_supported() -> str:
    """Return the model_types of all families, for people."""
    return ", ".join(LANGUAGE_MODELS)


def can_fuse(model_type: str) -> bool:
    """Whether `decoding.cuda` can join the products of a loaded model of this type."""
    family = LANGUAGE_MODELS.get(model_type)
    return family is not None and family.can_fuse


def language_config(raw: Mapping[str, Any], where: str) -> tuple[LanguageFamily, LanguageConfig]:
    """Return family and config of a config.json. Raises BundleError for a family that is not in the table."""
    family = LANGUAGE_MODELS.get(str(raw.get("model_type")))
    if family is None:
        raise BundleError(
            f"the language model in {where} has model_type {raw.get('model_type')!r}; supported are "
            f"{language_supported()}, and fine-tunes of them"
        )
    check_not_quantized(raw, where=where)
    return family, family.config.read(raw, where=where)


def read_language(folder: Folder, *, template: str) -> LanguageSource:
    """Return the language model of a folder from its config, tokenizer and headers. template: may add an end token.

    Raises BundleError if it is of no known family, has no tokenizer, or its weights do not fit its config.
    """
    raw = folder.read_json("config.json")
    family, config = language_config(raw, folder.name)
    tokenizer = read_tokenizer(folder)
    eos = end_tokens(folder.read_json_if_any("generation_config.json"), raw, tokenizer, template, family)
    return LanguageSource(family, folder, config, read_weights(folder), tokenizer, eos, folder).checked()
