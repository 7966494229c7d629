"""Everything that is known of a model without loading it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from captioner.errors import ConfigError
from captioner.model.adapter import AdapterConfig
from captioner.model.anyres import AnyRes
from captioner.model.language.language import LanguageConfig
from captioner.model.parts import Checkpoint, Parts
from captioner.model.projector_config import ProjectorConfig
from captioner.model.prompt_writer import PromptWriter
from captioner.model.towers.tower import TowerConfig
from captioner.model.weights import Weights

__all__ = ["BundleDescription", "ClipDescription", "description_of"]


@dataclass(frozen=True, kw_only=True)
class BundleDescription:
    """Everything that is known of a model without loading it."""

    name: str
    kind: Literal["bundle", "llava"]
    fingerprint: str
    """Hex digest of everything in the model that affects a caption."""

    clip: str
    """Where its vision tower is: folder, URL or hub id."""

    llama: str
    """Where its language model is."""

    checkpoint: Checkpoint | None = None
    """The published checkpoint that a bundle takes both from; None for any other model."""

    clip_fingerprint: str
    llama_fingerprint: str
    image_size: int
    """Side of the square images that the tower reads, in pixels."""

    preprocessing: dict[str, Any]
    """The image processor's config, as in preprocessor_config.json."""

    projector: ProjectorConfig
    template: str
    num_prompt_tokens: int
    """Tokens of the prompt, without the image."""

    num_prompt_tokens_before: int
    """Of these, the tokens before the image."""

    own_question: str = field(repr=False)
    """What the model's own prompt asks, with `{image}`: a named prompt of this text gives the same tokens."""

    prompt_tokens: tuple[str, ...] = field(repr=False)
    """The text of each token of the prompt, quoted, and `<image>` for those of the image."""

    prompt_writer: PromptWriter = field(repr=False, compare=False)
    """What writes named prompts for it."""

    eos_token_ids: tuple[int, ...]
    context_length: int
    """Most tokens that the language model reads, prompt and image included."""

    vocab_size: int
    clip_parameters: int
    """Of the vision tower alone."""

    projector_parameters: int
    llama_parameters: int
    weights_bytes: int
    """Bytes of all three as stored."""

    adapter: AdapterConfig | None = None
    """LoRA of the language model; None for one that is used as it is."""

    adapter_parameters: int = 0
    tower_config: TowerConfig = field(repr=False)
    language_config: LanguageConfig = field(repr=False)

    text_weights: Weights | None = field(repr=False)
    """Of CLIP's text tower; None without one, and then there is no CLIPScore."""

    anyres: AnyRes | None = field(default=None, repr=False)
    """The tiles of an image; None for a model that reads one square an image."""

    provenance: dict[str, Any]
    """How it was made, from its bundle.json."""

    @property
    def has_text_tower(self) -> bool:
        """Whether it can compute CLIPScore."""
        return self.text_weights is not None

    def check_text_tower(self, asker: str) -> None:
        """Raise ConfigError if there is no text tower. asker: the flag that needs it, or its feature."""
        if not self.has_text_tower:
            raise ConfigError(
                f"{asker} compares captions with images by CLIP's text tower, and {self.clip} has none; expected a"
                " bundle over a whole CLIP: text_model and text_projection in its weights, and its tokenizer.json"
            )

    @property
    def text_fingerprint(self) -> str:
        """Hex digest of the text tower and both projections, empty without them; does not affect captions."""
        return self.text_weights.fingerprint() if self.text_weights else ""

    @property
    def num_image_tokens(self) -> int:
        """Embeddings that stand for one image; of a model that reads tiles, the most that an image may have."""
        return self.anyres.most_tokens if self.anyres else self.projector.num_image_tokens

    @property
    def summary(self) -> str:
        """One log line for people and grep."""
        projector = self.projector
        lora = f" adapter=rank{self.adapter.rank}:{','.join(self.adapter.modules)}" if self.adapter else ""
        return (
            f"model={self.name} kind={self.kind} clip={_millions(self.clip_parameters)} image_size={self.image_size} "
            f"projector={projector.kind}:{projector.num_features}->{projector.num_image_tokens}x{projector.width} "
            f"llama={_millions(self.llama_parameters)}{lora} context_length={self.context_length} "
            f"template={self.template!r} fingerprint={self.fingerprint[:12]}"
        )


@dataclass(frozen=True, kw_only=True)
class ClipDescription:
    """A whole CLIP alone, whose joint space scores captions."""

    clip: str
    preprocessing: Mapping[str, Any]
    text_fingerprint: str
    """Hex digest of the text tower and both projections."""


def description_of(parts: Parts) -> BundleDescription:
    """Return what is known of the parts of a model."""
    return BundleDescription(
        name=parts.name,
        kind=parts.kind,
        fingerprint=parts.fingerprint,
        clip=parts.tower.folder.name,
        llama=parts.language.folder.name,
        checkpoint=parts.checkpoint,
        clip_fingerprint=parts.clip_fingerprint,
        llama_fingerprint=parts.llama_fingerprint,
        image_size=parts.tower.image_size,
        preprocessing=parts.tower.preprocessing,
        projector=parts.projector,
        template=parts.template.text,
        anyres=parts.anyres,
        num_prompt_tokens=parts.template.num_tokens,
        num_prompt_tokens_before=len(parts.template.prefix_ids),
        own_question=parts.turns.question_of(parts.template.text),
        prompt_tokens=tuple(
            parts.template.tokens(parts.language.tokenizer, parts.num_image_tokens, differs=bool(parts.anyres))
        ),
        prompt_writer=parts.prompt_writer,
        eos_token_ids=parts.language.eos_token_ids,
        context_length=parts.language.context_length,
        vocab_size=parts.language.config.vocab_size,
        clip_parameters=parts.tower.weights.num_parameters,
        projector_parameters=parts.projector_weights.num_parameters,
        llama_parameters=parts.language.weights.num_parameters,
        weights_bytes=sum(w.size_bytes for w in (parts.tower.weights, parts.projector_weights, parts.language.weights)),
        adapter=parts.adapter.config if parts.adapter else None,
        adapter_parameters=parts.adapter.weights.num_parameters if parts.adapter else 0,
        tower_config=parts.tower.config,
        language_config=parts.language.config,
        text_weights=parts.tower.text_weights,
        provenance=parts.provenance,
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.1f}B"
