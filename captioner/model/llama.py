"""LLaMA and its tokenizer: found in a folder, checked without loading, loaded unmodified.

Knows `LlamaForCausalLM` checkpoints of transformers (LLaMA 3, 3.1, 3.2 and their fine-tunes); nothing of images.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from captioner.errors import BundleError, ShapeError
from captioner.model.folder import Folder
from captioner.model.module import allocate, freeze, parse_config
from captioner.model.tokenizer import read_tokenizer
from captioner.model.weights import Weights, read_weights

__all__ = ["LlamaSource", "check_llama", "end_tokens", "load_llama", "read_llama"]

_END_OF_TURN = "<|eot_id|>"
_SHAPING = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)


@dataclass(frozen=True)
class LlamaSource:
    """A LLaMA that was found and checked but not loaded."""

    folder: Folder
    config: LlamaConfig
    weights: Weights
    tokenizer: PreTrainedTokenizerFast
    eos_token_ids: tuple[int, ...]

    @property
    def width(self) -> int:
        """Width of the embeddings it reads."""
        return int(self.config.hidden_size)

    @property
    def context_length(self) -> int:
        """Most tokens, prompt and image included, that it was made for."""
        return int(self.config.max_position_embeddings)

    def shape(self) -> dict[str, Any]:
        """Return the config values that decide what it computes."""
        return {name: getattr(self.config, name) for name in _SHAPING}

    def fingerprint(self) -> str:
        """Return a hex digest of weights, config and tokenizer."""
        tokens = self.tokenizer.backend_tokenizer.to_str()
        identity = [self.weights.fingerprint(), self.shape(), hashlib.sha256(tokens.encode()).hexdigest()]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_llama(folder: Folder, *, template: str) -> LlamaSource:
    """Return the LLaMA of a folder from its config, tokenizer and headers; the template decides its end tokens too.

    Raises BundleError if it is another kind of model, has no tokenizer, or its weights do not fit its config.
    """
    raw = folder.read_json("config.json")
    if raw.get("model_type") != "llama":
        raise BundleError(
            f"the language model in {folder.name} has model_type {raw.get('model_type')!r}; supported is llama "
            "(LLaMA 3, 3.1, 3.2 and fine-tunes of them)"
        )
    config = parse_config(LlamaConfig, raw, where=folder.name)
    tokenizer = read_tokenizer(folder)
    eos = end_tokens(folder.read_json_if_any("generation_config.json"), raw, tokenizer, template)
    return check_llama(LlamaSource(folder, config, read_weights(folder), tokenizer, eos))


def check_llama(source: LlamaSource) -> LlamaSource:
    """Return the source, without a stored copy of a tied output layer, if all fits; raise BundleError otherwise."""
    tied = frozenset({"lm_head.weight"} if source.config.tie_word_embeddings else ())
    source = replace(source, weights=source.weights.select(lambda name: None if name in tied else name))
    with torch.device("meta"):
        source.weights.check_fits(LlamaForCausalLM(source.config), optional=tied)
    largest = max(source.tokenizer.get_vocab().values(), default=-1)
    if largest >= source.config.vocab_size:
        raise ShapeError(
            f"the tokenizer in {source.folder.name} has token ids up to {largest}, its LLaMA embeds "
            f"{source.config.vocab_size} tokens; expected ids below that: use the model's own "
            "tokenizer, or resize_token_embeddings"
        )
    if not source.eos_token_ids:
        raise BundleError(
            f"{source.folder.name} names no end token; expected eos_token_id in generation_config.json or config.json"
        )
    return source


def end_tokens(
    generation: dict[str, Any], config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, template: str
) -> tuple[int, ...]:
    """Return the ids that end a caption: those of generation_config.json or else config.json, and the tokenizer's.

    A template that ends turns with `<|eot_id|>` makes it an end token too: published LLaVA checkpoints of
    LLaMA-3-Instruct name only `<|end_of_text|>`, which their models never write.
    """
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    if _END_OF_TURN in template and _END_OF_TURN in tokenizer.get_added_vocab():
        ids.add(tokenizer.convert_tokens_to_ids(_END_OF_TURN))
    return tuple(sorted(token for token in ids if token is not None))


def load_llama(source: LlamaSource, *, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Return the model, frozen, with nothing of its own generation settings left but the end tokens."""
    llama = allocate(LlamaForCausalLM, source.config, dtype=dtype, device=device)
    llama.tie_weights()
    source.weights.load_into(llama)
    eos = list(source.eos_token_ids)
    llama.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=source.tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos[0]
    )
    return freeze(llama)
