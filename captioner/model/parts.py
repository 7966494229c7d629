"""What a caption is made by - CLIP, projector, LLaMA, template - found and checked, before any weight is loaded.

Knows how the parts must fit each other; not where they came from (`bundle`, `llava`).
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from captioner.errors import BundleError, ShapeError
from captioner.model.caption_model import CaptionModel
from captioner.model.clip import ClipSource, load_clip, load_tower, pixel_affine
from captioner.model.joint_space import JointSpace
from captioner.model.llama import LlamaSource, load_llama
from captioner.model.module import allocate, freeze
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.model.template import Template
from captioner.model.weights import Weights

__all__ = ["Parts"]

_FINGERPRINT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A whole model, not loaded."""

    name: str
    kind: Literal["bundle", "llava"]
    clip: ClipSource
    llama: LlamaSource
    projector: ProjectorConfig
    projector_weights: Weights
    template: Template
    fitted_to: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the `clip` and `llama` that the projector was fitted to, where that was written down."""

    provenance: dict[str, Any] = field(default_factory=dict)
    """What the bundle tells of how it was made."""

    @cached_property
    def clip_fingerprint(self) -> str:
        """Hex digest of the vision tower."""
        return self.clip.fingerprint()

    @cached_property
    def llama_fingerprint(self) -> str:
        """Hex digest of the LLaMA and its tokenizer."""
        return self.llama.fingerprint()

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of everything in the model that shapes a caption."""
        identity = {
            "version": _FINGERPRINT_VERSION,
            "clip": self.clip_fingerprint,
            "pixels": self.clip.pixel_identity(),
            "projector": [asdict(self.projector), self.projector_weights.fingerprint()],
            "llama": self.llama_fingerprint,
            "template": self.template.text,
            "eos_token_ids": self.llama.eos_token_ids,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Raise ShapeError or BundleError, naming both sides, unless every part fits its neighbours."""
        self._check_widths()
        self._check_image_tokens()
        with torch.device("meta"):
            self.projector_weights.check_fits(build_projector(self.projector))
        self._check_context()
        self._check_fitted("CLIP", self.clip_fingerprint, self.clip.folder.name)
        self._check_fitted("LLaMA", self.llama_fingerprint, self.llama.folder.name)

    def load(self, *, dtype: torch.dtype, device: torch.device, with_text_tower: bool = False) -> CaptionModel:
        """Return the model on the device; the folders of all parts must be on disk.

        with_text_tower: CLIP's other half too. Raises BundleError where it has none."""
        projector = allocate(build_projector, self.projector, dtype=dtype, device=device)
        self.projector_weights.load_into(projector)
        num_layers = self.clip.num_layers(self.projector.vision_feature_layer) if self.projector.reads_patches else None
        pixel_scale, pixel_shift = pixel_affine(self.clip.preprocessing, device)
        return CaptionModel(
            vision_tower=load_tower(self.clip, num_layers=num_layers, dtype=dtype, device=device),
            projector=freeze(projector),
            projector_config=self.projector,
            llama=load_llama(self.llama, dtype=dtype, device=device),
            tokenizer=self.llama.tokenizer,
            template=self.template,
            eos_token_ids=self.llama.eos_token_ids,
            image_size=self.clip.image_size,
            preprocessing=self.clip.preprocessing,
            pixel_scale=pixel_scale,
            pixel_shift=pixel_shift,
            fingerprint=self.fingerprint,
            joint_space=self._joint_space(dtype, device) if with_text_tower else None,
        )

    def _joint_space(self, dtype: torch.dtype, device: torch.device) -> JointSpace:
        clip, tokenizer = load_clip(self.clip.folder, dtype=dtype, device=device)
        return JointSpace(clip, tokenizer, keeps_vision_tower=self.projector.reads_patches)

    def _check_widths(self) -> None:
        features = self.clip.config.hidden_size
        if self.projector.num_features != features:
            raise ShapeError(
                f"the projector of {self.name} reads image features of width {self.projector.num_features}, the CLIP "
                f"in {self.clip.folder.name} gives width {features}; use the CLIP it was fitted to, or fit it anew"
            )
        if self.projector.width != self.llama.width:
            raise ShapeError(
                f"the projector of {self.name} gives embeddings of width {self.projector.width}, the LLaMA in "
                f"{self.llama.folder.name} reads width {self.llama.width}; use the LLaMA it was fitted to, or fit anew"
            )

    def _check_image_tokens(self) -> None:
        if not self.projector.reads_patches:
            return
        self.clip.num_layers(self.projector.vision_feature_layer)
        states = self.clip.num_patches + (self.projector.vision_feature_select_strategy == "full")
        if self.projector.num_image_tokens != states:
            raise ShapeError(
                f"the projector of {self.name} says {self.projector.num_image_tokens} image tokens, the CLIP in "
                f"{self.clip.folder.name} gives {states} patch states; expected the same number"
            )

    def _check_context(self) -> None:
        prompt = self.template.num_tokens + self.projector.num_image_tokens
        if prompt >= self.llama.context_length:
            raise BundleError(
                f"prompt and image of {self.name} take {prompt} tokens, the LLaMA in {self.llama.folder.name} reads "
                f"{self.llama.context_length}; expected a shorter prompt or fewer image tokens"
            )

    def _check_fitted(self, part: str, actual: str, where: str) -> None:
        fitted = self.fitted_to.get(part.lower(), actual)
        if fitted != actual:
            raise BundleError(
                f"the projector of {self.name} was fitted to another {part}: bundle.json records fingerprint "
                f"{fitted[:12]}, {where} has {actual[:12]}; use the {part} it was fitted to, or fit the projector anew"
            )
