"""What is known of a family of language models, and a model of one: found in a folder, not loaded yet.

Knows no family: `llama`, `mistral` and `qwen2` are entries of `table`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from captioner.errors import BundleError, ShapeError
from captioner.model.configs import PartConfig, check_heads, invalid, known_values
from captioner.model.folder import Folder
from captioner.model.shapes import Shapes, linear_shapes
from captioner.model.tokenizer import Tokenizer
from captioner.model.weights import Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "SHAPING",
    "LanguageConfig",
    "LanguageFamily",
    "LanguageSource",
    "Turn",
    "decoder_shapes",
    "end_tokens",
    "read_window",
]

SHAPING = (
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
"""Values of a config that decide the results of a decoder."""

_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
"""Types of rotary embeddings, and the keys that each needs."""

_SCALED_ROPES = ("llama3", "yarn", "longrope")
_ROPE_NAMES = ("rope_scaling", "rope_theta", "rope_parameters", "partial_rotary_factor")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(PartConfig):
    """A decoder of LLaMA's kind: rotary embeddings, grouped queries, a gated MLP. The defaults are a family's own."""

    unchecked: ClassVar[tuple[str, ...]] = ("raw", "rope_parameters")
    optional: ClassVar[tuple[str, ...]] = ("num_key_value_heads", "head_dim")
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    """As many as attention heads where the file names none."""

    head_dim: int = 0
    """The width over the heads where the file names none."""

    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, raw: Mapping[str, Any], *, where: str) -> Self:
        """Return the config of a language model. Raises BundleError for a value that cannot be."""
        known = known_values(cls, {name: raw[name] for name in raw if name not in _ROPE_NAMES}, where)
        config = cls(**known, raw=raw)
        kv_heads = config.num_key_value_heads if raw.get("num_key_value_heads", 0) is not None else 0
        config = replace(
            config,
            num_key_value_heads=kv_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // max(1, config.num_attention_heads),
            rope_parameters=_rope(cls, raw, config.max_position_embeddings, where),
        )
        check_heads(config, where)
        return config

    def for_transformers(self) -> dict[str, Any]:
        """Return what the class of transformers is made of."""
        return {**{name: value for name, value in self.raw.items() if name not in _ROPE_NAMES}, **self.own_values()}

    @property
    def context_length(self) -> int:
        """Most tokens at which every one reads all before it."""
        return self.max_position_embeddings

    @property
    def kv_values(self) -> int:
        """Numbers that the KV cache keeps for a token."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Turn:
    """How a family writes one question about an image, where the tokenizer has no chat template."""

    needs: str
    """The token by which a tokenizer of the family is known."""

    text: str
    """With `{system}`, `{image}` and `{question}`."""

    system: str
    """What a system prompt becomes, with `{system}`; nothing without a system prompt."""

    default_system: str = ""

    def render(self, question: str, system: str | None) -> str:
        """Return the whole prompt, with `{image}` where the image goes."""
        told = self.default_system if system is None else system
        before = self.system.replace("{system}", told) if told else ""
        text = self.text.replace("{system}", before, 1)
        return text.replace("{question}", question, 1)


@dataclass(frozen=True, kw_only=True)
class LanguageFamily:
    """A family of language models: how it is read and built, and how it writes a turn."""

    name: str
    """In messages and plans."""

    config: type[LanguageConfig]
    """Reads its config.json; `config.model_type` is the key of the family."""

    shaping: tuple[str, ...] = ("model_type", *SHAPING)
    """Values of the config that decide results."""

    shapes: Callable[[Any], Shapes]
    """The tensors of a config."""

    classes: "Callable[[], tuple[type[PretrainedConfig], type[PreTrainedModel]]]"
    """The classes of transformers."""

    turns: tuple[Turn, ...]
    """How it writes a turn, by the tokenizer's tokens; the first that fits is taken."""

    end_of_turn: tuple[str, ...] = ()
    """Tokens that end a caption where the prompt has them, whatever the checkpoint names."""

    can_fuse: bool = False
    """Whether its layers are those that `decoding.cuda` joins: q, k, v, o and a gated MLP around RMS norms."""


@dataclass(frozen=True)
class LanguageSource:
    """A language model that was found and checked, not loaded yet."""

    family: LanguageFamily
    folder: Folder
    config: LanguageConfig
    weights: Weights
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    tokenizer_folder: Folder
    """Where its tokenizer is; its own folder, unless the user named another."""

    @property
    def width(self) -> int:
        """Width of the embeddings it reads."""
        return int(self.config.hidden_size)

    @property
    def context_length(self) -> int:
        """Most tokens that it reads, prompt and image included."""
        return int(self.config.context_length)

    def shape(self) -> dict[str, Any]:
        """Return the config values that affect its results."""
        return {name: getattr(self.config, name) for name in self.family.shaping}

    def fingerprint(self) -> str:
        """Return a hex digest of weights, config and tokenizer."""
        tokens = self.tokenizer.backend_tokenizer.to_str()
        identity = [self.weights.fingerprint(), self.shape(), hashlib.sha256(tokens.encode()).hexdigest()]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def checked(self) -> "LanguageSource":
        """Return the source, without a stored copy of a tied output layer, if all fits; raise BundleError otherwise."""
        tied = frozenset({"lm_head.weight"} if self.config.tie_word_embeddings else ())
        source = replace(self, weights=self.weights.select(lambda name: None if name in tied else name))
        module = self.config.class_name.replace("Config", "ForCausalLM")
        source.weights.check_fits(self.family.shapes(self.config), module, optional=tied)
        source._check_tokens()
        return source

    def _check_tokens(self) -> None:
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if largest >= self.config.vocab_size:
            raise ShapeError(
                f"the tokenizer in {self.tokenizer_folder.name} has token ids up to {largest}, its {self.family.name} "
                f"embeds {self.config.vocab_size} tokens; expected ids below that: use the model's own "
                "tokenizer, or resize_token_embeddings"
            )
        if not self.eos_token_ids:
            raise BundleError(
                f"{self.folder.name} names no end token; expected eos_token_id in generation_config.json or config.json"
            )


def decoder_shapes(config: LanguageConfig, *, biased: frozenset[str] = frozenset()) -> Shapes:
    """Return the tensors of a decoder of LLaMA's kind. biased: the linear maps of a layer that add a bias."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: Shapes = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (config.vocab_size, width),
    }
    attention = {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
    }
    mlp = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    for layer in (f"model.layers.{number}" for number in range(config.num_hidden_layers)):
        shapes |= {f"{layer}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, (reads, gives) in attention.items():
            shapes |= linear_shapes(f"{layer}.self_attn.{name}", reads, gives, has_bias=name in biased)
        for name, (reads, gives) in mlp.items():
            shapes |= linear_shapes(f"{layer}.mlp.{name}", reads, gives, has_bias=name in biased)
    return shapes


def read_window(kind: type[LanguageConfig], raw: Mapping[str, Any], where: str) -> int | None:
    """Return the sliding window of a file. Raises BundleError unless it is a length or null."""
    window = raw.get("sliding_window", 4096)  # the default of transformers
    if window is not None and (not isinstance(window, int) or window < 1):
        raise invalid(kind, where, f"sliding_window is {window!r}; expected a number of tokens, or null")
    return window


def end_tokens(
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    template: str,
    family: LanguageFamily,
) -> tuple[int, ...]:
    """Return the ids that end a caption: those of generation_config.json or else config.json, and the tokenizer's.

    A template that ends turns with a token of the family, as `<|eot_id|>`, makes it an end token too: published LLaVA
    checkpoints of LLaMA-3-Instruct name only `<|end_of_text|>`, which their models never generate.
    """
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    known = tokenizer.get_added_vocab()
    ids |= {known[token] for token in family.end_of_turn if token in template and token in known}
    return tuple(sorted(token for token in ids if token is not None))


def _rope(kind: type[LanguageConfig], raw: Mapping[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    """Return the rotary embeddings as transformers 5 writes them, from the names of any of its releases."""
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10_000.0))
    if (factor := raw.get("partial_rotary_factor")) is not None:
        rope.setdefault("partial_rotary_factor", factor)
    of_type = str(rope.setdefault("rope_type", rope.get("type", "default")))
    if of_type not in _ROPE_KEYS:
        raise invalid(kind, where, f"rope_type is {of_type!r}; expected one of {', '.join(_ROPE_KEYS)}")
    if of_type in _SCALED_ROPES:
        rope.setdefault("original_max_position_embeddings", max_positions)
    if missing := [key for key in _ROPE_KEYS[of_type] if key not in rope]:
        raise invalid(kind, where, f"rope_parameters of type {of_type} lack {', '.join(missing)}")
    return rope
