"""The demo bundle in memory, and the labelled scenes as its towers read them."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from captioner.demo import scenes
from captioner.demo.scenes import Scene, Split
from captioner.demo.training import tokens
from captioner.demo.training.options import Training
from captioner.model.bundle import save_bundle
from captioner.model.projector import ProjectorConfig

IMAGE_SIZE = 64
MAX_TEXT_TOKENS = 64
PROVENANCE = {"made_by": "python -m captioner.demo.training.train", "data": "captioner.demo.scenes, split train"}
CLIPSCORE_PREFIX = "A photo depicts "
"""CLIPScore (arXiv:2104.08718) puts this before every caption, so the text tower reads half of its captions with it."""


@dataclass(frozen=True)
class Labelled:
    """Scenes of one split and their pixels, as the towers will see them: through a file and its decoding."""

    scenes: list[Scene]
    pixels: Tensor
    """uint8[N, 3, 64, 64]"""

    @classmethod
    def draw(cls, split: Split, count: int, *, seed: int) -> "Labelled":
        """The first `count` images of a split."""
        kept: list[Scene] = []
        pixels = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        for row, example in enumerate(scenes.examples(split, count, seed=seed)):
            kept.append(example.scene)
            pixels[row] = torch.from_numpy(decode(example.image))
        return cls(kept, pixels)


def decode(image: bytes) -> NDArray[np.uint8]:
    """uint8[3, 64, 64]; on a square canvas CLIP's preprocessing is this one resize."""
    opened = Image.open(io.BytesIO(image)).convert("RGB")
    resized = opened.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1).copy()


def normalise(pixels: Tensor) -> Tensor:
    """uint8[B, 3, S, S] to float32[B, 3, S, S] with CLIP's mean and deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels / 255 - mean) / std


def caption_ids(
    rows: list[Scene],
    tokenizer: CLIPTokenizer | PreTrainedTokenizerFast,
    *,
    prefixes: tuple[str, ...] = ("",),
    end: str = "",
) -> Tensor:
    """int64[N, prefixes * captions, L]: every reference with every prefix, filled up with the end token."""
    texts = [prefix + caption + end for scene in rows for prefix in prefixes for caption in scene.captions]
    ids = [torch.tensor(row) for row in tokenizer(texts, add_special_tokens=not end).input_ids]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.eos_token_id)
    return padded.view(len(rows), -1, padded.shape[1])


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The models and tokenizers, in memory."""

    clip: CLIPModel
    clip_tokenizer: CLIPTokenizer
    projector: nn.Linear
    llama: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def new(cls, training: Training, texts: list[str]) -> "Bundle":
        """Random weights, and tokenizers fitted on the texts."""
        clip_texts = [prefix + text for prefix in ("", CLIPSCORE_PREFIX) for text in texts]
        clip_tokenizer = tokens.clip_tokenizer(clip_texts, num_merges=256, max_length=MAX_TEXT_TOKENS)
        tokenizer = tokens.llama_tokenizer(texts, vocab_size=512, max_length=MAX_TEXT_TOKENS)
        return cls(
            clip=new_clip(training, clip_tokenizer),
            clip_tokenizer=clip_tokenizer,
            projector=nn.Linear(training.clip_width, training.llama_width),
            llama=new_llama(training, tokenizer),
            tokenizer=tokenizer,
        )

    def save(self, folder: Path) -> None:
        """Write everything but the model card."""
        self.clip.save_pretrained(folder / "clip")
        self.clip_tokenizer.save_pretrained(folder / "clip")
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder / "clip")
        self.llama.save_pretrained(folder / "llama")
        self.tokenizer.save_pretrained(folder / "llama")
        config = ProjectorConfig(
            kind="linear", num_features=self.projector.in_features, width=self.projector.out_features
        )
        save_bundle(folder, self.projector, config, clip="clip", llama="llama", provenance=PROVENANCE)


def new_clip(training: Training, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Two towers of the same width."""
    towers = {
        "hidden_size": training.clip_width,
        "intermediate_size": 2 * training.clip_width,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "projection_dim": training.clip_width,
    }
    vision = {"image_size": IMAGE_SIZE, "patch_size": training.patch_size, "num_hidden_layers": training.clip_layers}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TEXT_TOKENS,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(
        CLIPConfig(vision_config=towers | vision, text_config=towers | text, projection_dim=training.clip_width)
    )


def new_llama(training: Training, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Grouped-query attention: four heads share two of keys and values. Embeddings are tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=training.llama_width,
        intermediate_size=3 * training.llama_width,
        num_hidden_layers=training.llama_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def prompts(bundle: Bundle, states: Tensor) -> Tensor:
    """float[B, 2, D]: the start token, then the projected image."""
    start = bundle.llama.get_input_embeddings()(torch.tensor(bundle.tokenizer.bos_token_id))
    return torch.stack([start.expand(len(states), -1), bundle.projector(states)], dim=1)


@torch.no_grad()
def image_states(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """float[N, W]: the normalised CLS states, as the captioner will read them."""
    parts = [clip.vision_model(pixel_values=normalise(part)).pooler_output for part in torch.split(pixels, 256)]
    return torch.cat(parts)


def text_vectors(clip: CLIPModel, ids: Tensor) -> Tensor:
    """float[B, P], of length one. ids: int64[B, L], filled up with the end token; CLIP reads the state at the first."""
    return F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)
