"""The parts of a model - tower, projector, language model, template - found and checked before a weight is loaded.

Knows how the parts must fit each other; not which layout they came from (`bundle`, `layouts`).
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from captioner.errors import BundleError, ShapeError
from captioner.images.preprocessing import Preprocessing
from captioner.model.adapter import Adapter
from captioner.model.anyres import AnyRes
from captioner.model.language.language import LanguageSource
from captioner.model.projector_config import KINDS, ProjectorConfig
from captioner.model.prompt_writer import PromptWriter
from captioner.model.shapes import Shapes
from captioner.model.template import Template
from captioner.model.towers.tower import TowerSource
from captioner.model.turns import Turns
from captioner.model.weights import Weights

__all__ = ["Checkpoint", "Parts"]

_FINGERPRINT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The published checkpoint that a bundle takes tower and language model from."""

    location: str
    tokenizer: str | None = None
    """Where its tokenizer is, in place of its own."""

    vision_tower: str | None = None
    """Where its tower is, in place of the one that it names."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A whole model, not loaded yet."""

    name: str
    kind: Literal["bundle", "llava"]
    tower: TowerSource
    language: LanguageSource
    projector: ProjectorConfig
    projector_weights: Weights
    adapter: Adapter | None = None
    """LoRA of the language model; None for one that is used as it is."""

    template: Template
    turns: Turns
    """How it is asked by named prompts."""

    anyres: AnyRes | None = None
    """The tiles of an image and how their patches are packed; None for a model that reads one square an image."""

    newline_weights: Weights | None = None
    """`image_newline`, of a model that reads tiles."""

    checkpoint: Checkpoint | None = None
    """Where tower and language model are, of a bundle over a published checkpoint."""

    fitted_to: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the `clip` and `llama` that the projector was fitted to, where they were recorded."""

    provenance: dict[str, Any] = field(default_factory=dict)
    """How the bundle was made, as it records."""

    @cached_property
    def clip_fingerprint(self) -> str:
        """Hex digest of the vision tower."""
        return self.tower.fingerprint()

    @cached_property
    def llama_fingerprint(self) -> str:
        """Hex digest of the language model and its tokenizer."""
        return self.language.fingerprint()

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything in the model that affects a caption."""
        identity: dict[str, Any] = {
            "version": _FINGERPRINT_VERSION,
            "clip": self.clip_fingerprint,
            "pixels": self.tower.pixel_identity(),
            "projector": [asdict(self.projector), self.projector_weights.fingerprint()],
            "llama": self.llama_fingerprint,
            "template": self.template.text,
            "eos_token_ids": self.language.eos_token_ids,
        }
        if self.adapter:
            identity["adapter"] = self.adapter.fingerprint()
        if self.anyres and self.newline_weights:
            identity["tiles"] = [self.anyres.identity(), self.newline_weights.fingerprint()]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Raise ShapeError or BundleError, naming both sides, unless every part fits its neighbours."""
        self._check_widths()
        self._check_image_tokens()
        self.projector_weights.check_fits(self.projector.shapes, KINDS[self.projector.kind].module)
        if self.adapter:
            self.adapter.check(self.language_shapes, f"the {self.language_name} in {self.language.folder.name}")
        self._check_tiles()
        self._check_context()
        self._check_fitted("clip", self.tower_name, self.clip_fingerprint, self.tower.folder.name)
        self._check_fitted("llama", self.language_name, self.llama_fingerprint, self.language.folder.name)

    @property
    def prompt_writer(self) -> PromptWriter:
        """What writes named prompts for it."""
        return PromptWriter(self.turns, self.language.tokenizer)

    @property
    def tower_name(self) -> str:
        """The family of the vision tower, for people."""
        return self.tower.family.name

    @property
    def language_name(self) -> str:
        """The family of the language model, for people."""
        return self.language.family.name

    @property
    def language_shapes(self) -> Shapes:
        """The tensors of the language model."""
        return self.language.family.shapes(self.language.config)

    def _check_widths(self) -> None:
        features = self.tower.config.hidden_size
        if self.projector.num_features != features:
            raise ShapeError(
                f"the projector of {self.name} reads image features of width {self.projector.num_features}, the "
                f"{self.tower_name} in {self.tower.folder.name} gives width {features}; use the {self.tower_name} it "
                "was fitted to, or fit it again"
            )
        if self.projector.width != self.language.width:
            raise ShapeError(
                f"the projector of {self.name} gives embeddings of width {self.projector.width}, the "
                f"{self.language_name} in {self.language.folder.name} reads width {self.language.width}; use the "
                f"{self.language_name} it was fitted to, or fit again"
            )

    def _check_image_tokens(self) -> None:
        if not self.projector.reads_patches:
            self._check_pooled()
            return
        self.tower.num_layers(self.projector.vision_feature_layer)
        states = self.tower.num_states - (self.projector.vision_feature_select_strategy == "default")
        if KINDS[self.projector.kind].pooling:
            self._check_pooling(states)
        elif self.projector.num_image_tokens != states:
            raise ShapeError(
                f"the projector of {self.name} says {self.projector.num_image_tokens} image tokens, the "
                f"{self.tower_name} in {self.tower.folder.name} gives {states} patch states; expected the same number"
            )

    def _check_pooling(self, states: int) -> None:
        patches = self.tower.config.num_patches
        if states != patches or self.projector.num_image_tokens > patches:
            raise ShapeError(
                f"the projector of {self.name} pools patches to {self.projector.num_image_tokens} image tokens and "
                f"reads {states} states of the {self.tower_name} in {self.tower.folder.name}, which has {patches} "
                "patches; expected the patches alone, and no more tokens than patches"
            )

    def _check_pooled(self) -> None:
        if not self.tower.family.has_pooled(self.tower.config):
            raise BundleError(
                f"the projector of {self.name} reads the pooled state, which the {self.tower_name} in "
                f"{self.tower.folder.name} lacks: its head is not there; expected a whole {self.tower_name}, or a "
                "projector that reads patches"
            )

    @property
    def num_image_tokens(self) -> int:
        """Tokens that stand for one image; of a model that reads tiles, the most that an image may have."""
        return self.anyres.most_tokens if self.anyres else self.projector.num_image_tokens

    def _check_tiles(self) -> None:
        read = Preprocessing.from_config(self.tower.preprocessing)
        resolutions = self.anyres.resolutions if self.anyres else ()
        if read.resolutions != resolutions:
            raise BundleError(
                f"the config of {self.name} has image_grid_pinpoints {_pairs(resolutions)}, its image processor "
                f"{_pairs(read.resolutions)}; expected the same in both"
            )
        if self.anyres is None:
            return
        if self.newline_weights is None or not self.newline_weights.tensors:
            raise BundleError(
                f"the config of {self.name} cuts images into tiles, whose rows end with image_newline, and its weights "
                f"have none; expected image_newline of width {self.projector.width}, or a checkpoint of one tile"
            )
        self.newline_weights.check_fits({"image_newline": (self.projector.width,)}, self.name)
        if self.projector.num_image_tokens != self.anyres.patches**2:
            raise ShapeError(
                f"{self.name} reads {self.projector.num_image_tokens} states of each tile "
                f"(vision_feature_select_strategy {self.projector.vision_feature_select_strategy!r}), and tiles are "
                f"packed by their {self.anyres.patches} x {self.anyres.patches} patches; expected the patches alone"
            )

    def _check_context(self) -> None:
        prompt = self.template.num_tokens + self.num_image_tokens
        if prompt >= self.language.context_length:
            raise BundleError(
                f"prompt and image of {self.name} take {prompt} tokens, the {self.language_name} in "
                f"{self.language.folder.name} reads {self.language.context_length}; expected a shorter prompt or fewer"
                " image tokens"
            )

    def _check_fitted(self, part: str, family: str, actual: str, where: str) -> None:
        fitted = self.fitted_to.get(part, actual)
        if fitted != actual:
            raise BundleError(
                f"the projector of {self.name} was fitted to another {family}: bundle.json records fingerprint "
                f"{fitted[:12]}, {where} has {actual[:12]}; use the {family} it was fitted to, or fit the projector"
                " again"
            )


def _pairs(resolutions: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in resolutions) or "none"
