"""CLIP, projector and LLaMA together: pixels to image embeddings, the prompt around them, token ids to text.

Knows tensors and tokens; not files, images or Ray. `generate` is transformers' own: the reference for the decoding
engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from captioner.config import DecodingConfig
from captioner.model.joint_space import JointSpace
from captioner.model.projector import ProjectorConfig
from captioner.model.prompt_writer import PromptWriter
from captioner.model.template import Template
from captioner.model.tile_packer import TilePacker
from captioner.model.vision import VisionEncoder
from captioner.schema import FinishReason

__all__ = ["CaptionModel", "Generated"]


@dataclass(frozen=True)
class Generated:
    """One caption as token ids, its end token included, with the log probability of each."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionModel:
    """A model to caption with, frozen, on one device in one dtype.

    Letters in shapes: B images, S image side, F tower width, P patch states, k image tokens, D language model width.
    """

    vision: VisionEncoder
    """The vision tower with its pixels' scale and shift, loaded up to the layer that the projector reads."""

    projector: nn.Module
    projector_config: ProjectorConfig
    llama: LlamaForCausalLM
    """The language model: this class, or that of another family with the same methods."""

    tokenizer: PreTrainedTokenizerFast
    template: Template
    eos_token_ids: tuple[int, ...]
    context_length: int
    """Most tokens that the language model reads, prompt and image included; a sliding window bounds it."""

    preprocessing: dict[str, Any] = field(repr=False)
    fingerprint: str
    prompt_writer: PromptWriter = field(repr=False, compare=False)
    """What writes named prompts for it."""

    packer: TilePacker | None = None
    """Packs the patches of an image's tiles; None for a model that reads one square an image."""

    joint_space: JointSpace | None = field(default=None, repr=False)
    """CLIP's space of images and captions; None unless the model was loaded with its text tower."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.llama.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.llama.dtype

    @property
    def num_image_tokens(self) -> int:
        """Embeddings k that stand for one image; of a model that reads tiles, the most that an image may have."""
        return self.packer.anyres.most_tokens if self.packer else self.projector_config.num_image_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the first one of a caption: prompt and image."""
        return self.template.num_tokens + self.num_image_tokens

    @property
    def vision_tower(self) -> nn.Module:
        """The vision tower."""
        return self.vision.tower

    @property
    def image_size(self) -> int:
        """Side S of the square images it reads, in pixels."""
        return self.vision.image_size

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of each image, float[B, k, D], from uint8[B, 3, S, S] on any device."""
        return self.project(self.features(pixels))

    @torch.no_grad()
    def project(self, features: Tensor) -> Tensor:
        """Return the embeddings of each image, float[B, k, D], from its `features`; of each tile where it has tiles."""
        embeddings: Tensor = self.projector(features)
        return embeddings

    @torch.no_grad()
    def pack(self, patches: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return the image tokens of each image, float[k, D] with its own k, from its projected tiles.

        patches: float[tiles of all images, P, D]; sizes: width and height of each image in pixels."""
        assert self.packer is not None, "reads one square an image"
        counts = [self.packer.anyres.num_tiles(*size) for size in sizes]
        assert sum(counts) == len(patches), (counts, patches.shape)
        of_images = torch.split(patches, counts)
        return [self.packer(tiles, *size) for tiles, size in zip(of_images, sizes, strict=True)]

    @torch.no_grad()
    def joint_features(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Return each image in CLIP's joint space, float[B, J], from its pixels and its `features`.

        A model of patch features runs the vision tower again, because its own is loaded without the last layers."""
        assert self.joint_space is not None, "loaded without its text tower"
        if self.projector_config.reads_patches:
            return self.joint_space.of_pixels(self.vision.normalised(pixels))
        return self.joint_space.of_pooled(features)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Return the image features that the projector reads, from uint8[B, 3, S, S] on any device.

        float[B, F], the pooled state, for a linear projector; float[B, P, F], the states of one layer, for an MLP.
        Raises ShapeError for pixels of another shape or type.
        """
        if not self.projector_config.reads_patches:
            return self.vision.pooled(pixels)
        first = 1 if self.projector_config.vision_feature_select_strategy == "default" else 0
        return self.vision.states(pixels)[:, first:]

    @torch.no_grad()
    def prompt_embeddings(self) -> Tensor:
        """Return the embeddings of the prompt before the image, float[tokens, D]: the same for every image."""
        return self.embed(self.template.prefix_ids)

    def request_embeddings(self, image_embeds: Tensor) -> Tensor:
        """Return each image and the prompt after it, float[B, k + tokens, D], from float[B, k, D].

        Differentiable in `image_embeds`: a fit gives LLaMA the same inputs as captioning."""
        suffix = self._suffix.expand(len(image_embeds), -1, -1)
        return torch.cat([image_embeds.to(suffix), suffix], dim=1)

    def text(self, token_ids: list[int]) -> str:
        """Return the caption of the tokens, without special tokens and surrounding spaces."""
        decoded = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded).strip()

    @torch.no_grad()
    def generate(self, image_embeds: Tensor, decoding: DecodingConfig) -> list[Generated]:
        """Return `num_captions` captions for each of float[B, k, D], those of one image together, best first.

        Without stop strings, which are the engine's alone.
        """
        assert not decoding.stop, decoding.stop
        request = self.request_embeddings(image_embeds)
        prompt = self.prompt_embeddings().expand(len(request), -1, -1)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(decoding.seed)
            llama: Any = self.llama  # transformers types these two methods for a protocol that it does not meet
            out = llama.generate(
                inputs_embeds=torch.cat([prompt, request], dim=1),
                attention_mask=torch.ones(len(request), self.num_prompt_tokens, dtype=torch.long, device=self.device),
                generation_config=self._generation_config(decoding),
            )
        logprobs = llama.compute_transition_scores(
            out.sequences, out.logits, out.get("beam_indices"), normalize_logits=True
        )
        return [self._caption(*row) for row in zip(out.sequences.tolist(), logprobs.tolist(), strict=True)]

    @cached_property
    def _suffix(self) -> Tensor:
        """float[tokens, D], the prompt after the image; usable in autograd even if first computed in inference mode."""
        with torch.inference_mode(False), torch.no_grad():
            return self.embed(self.template.suffix_ids)

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Return the embeddings of tokens, float[tokens, D]."""
        embeddings: Tensor = self.llama.get_input_embeddings()(
            torch.tensor(list(token_ids), dtype=torch.long, device=self.device)
        )
        return embeddings

    def _generation_config(self, decoding: DecodingConfig) -> GenerationConfig:
        sampling = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
        beams = {"length_penalty": decoding.length_penalty, "early_stopping": decoding.early_stopping}
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens,
            repetition_penalty=decoding.repetition_penalty,
            num_beams=decoding.num_beams,
            num_return_sequences=decoding.num_captions,
            do_sample=decoding.do_sample,
            eos_token_id=list(self.eos_token_ids),
            pad_token_id=self.eos_token_ids[0],
            return_dict_in_generate=True,
            output_logits=True,
            **(sampling | {"min_p": decoding.min_p} if decoding.do_sample else {}),
            **(beams if decoding.num_beams > 1 else {}),
        )

    def _caption(self, token_ids: list[int], logprobs: list[float]) -> Generated:
        """Return the row up to its first end token; the rest is padding."""
        ends = [i for i, token in enumerate(token_ids) if token in self.eos_token_ids]
        if not ends:
            return Generated(token_ids, logprobs, FinishReason.LENGTH)
        length = ends[0] + 1
        return Generated(token_ids[:length], logprobs[:length], FinishReason.STOP)
