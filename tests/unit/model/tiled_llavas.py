"""LLaVA-NeXT and LLaVA-OneVision of transformers' own classes at toy size, and what they make of an image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PretrainedConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.unit.model.tiny_models import (
    IMAGE_SIZE,
    clip_config,
    language_config,
    llama3_tokenizer,
    preprocessor_config,
    siglip_config,
    siglip_preprocessor,
    write_json,
)

NEXT_GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
ONEVISION_GRIDS = [[IMAGE_SIZE * rows, IMAGE_SIZE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
SIZES = [
    *((200, 20), (20, 200), (90, 30), (64, 64), (31, 33), (33, 31), (10, 10), (150, 100), (100, 150), (75, 10)),
    *((48, 96), (96, 48), (300, 290), (40, 120), (7, 60), (61, 64), (128, 32), (32, 32)),
]


def photographs(sizes: list[tuple[int, int]] = SIZES) -> list[Image.Image]:
    """Images of these sizes, each unlike the others."""
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [one.resize(size, Image.Resampling.BICUBIC) for one, size in zip(coarse, sizes, strict=True)]


def save_llava_next(folder: Path, language: str = "llama", **changes: Any) -> Path:
    """A LLaVA-NeXT over CLIP, as published."""
    config = LlavaNextConfig(
        vision_config=clip_config().vision_config,
        text_config=language_config(language),
        image_token_index=272,
        image_grid_pinpoints=NEXT_GRIDS,
        **changes,
    )
    grids = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": NEXT_GRIDS, "do_pad": True}
    return _saved(folder, LlavaNextForConditionalGeneration, config, preprocessor_config() | grids)


def save_onevision(folder: Path, language: str = "qwen2", **changes: Any) -> Path:
    """A LLaVA-OneVision over SigLIP without its head, as published."""
    config = LlavaOnevisionConfig(
        vision_config=siglip_config(vision_use_head=False),
        text_config=language_config(language),
        image_token_index=272,
        image_grid_pinpoints=ONEVISION_GRIDS,
        vision_aspect_ratio="anyres_max_4",
        **changes,
    )
    grids = {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": ONEVISION_GRIDS}
    return _saved(folder, LlavaOnevisionForConditionalGeneration, config, siglip_preprocessor() | grids)


def _saved(folder: Path, kind: type[Any], config: PretrainedConfig, preprocessing: dict[str, Any]) -> Path:
    torch.manual_seed(2)
    model = kind(config)
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=257)
    model.save_pretrained(folder)
    llama3_tokenizer(extra=("<image>", "<pad>")).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", preprocessing)
    return folder


class Reference:
    """transformers' own class and image processor of a checkpoint in tiles."""

    def __init__(self, folder: Path) -> None:
        is_next = (folder / "config.json").read_text().count("LlavaNext")
        kind: Any = LlavaNextForConditionalGeneration if is_next else LlavaOnevisionForConditionalGeneration
        processor: Any = LlavaNextImageProcessorPil if is_next else LlavaOnevisionImageProcessorPil
        self.model = kind.from_pretrained(folder)
        self._processor = processor.from_pretrained(folder)

    def seen(self, image: Image.Image) -> dict[str, Tensor]:
        """What the processor gives for one image."""
        found = self._processor(image, return_tensors="pt")
        return {"pixel_values": found["pixel_values"], "image_sizes": found["image_sizes"]}

    @torch.no_grad()
    def features(self, seen: dict[str, Tensor]) -> Tensor:
        """float[n, D], what the language model reads in place of the image."""
        found: Tensor = self.model.get_image_features(**seen).pooler_output[0]
        return found

    def tokens(self, seen: dict[str, Tensor], prefix: list[int], suffix: list[int], length: int) -> list[int]:
        """The greedy tokens of one image, without an end token."""
        image = [self.model.config.image_token_id] * len(self.features(seen))
        ids = torch.tensor([[*prefix, *image, *suffix]])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **seen,
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=257,
            pad_token_id=257,
        )
        row: list[int] = out[0, ids.shape[1] :].tolist()
        return row[: row.index(257)] if 257 in row else row
