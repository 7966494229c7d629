"""How good the demo bundle is on descriptions that it never saw, and the model card that says so.

Uses transformers' classes alone, so that it is a check of this package's model code.
"""

import random
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.demo import scenes
from captioner.demo.scenes import Scene
from captioner.demo.training.models import (
    CLIPSCORE_PREFIX,
    Bundle,
    Labelled,
    caption_ids,
    image_states,
    prompts,
    text_vectors,
)
from captioner.demo.training.options import Training


def measure(bundle: Bundle, test: Labelled) -> dict[str, float]:
    """What the model card states, on images of descriptions that were never trained on."""
    said = captions(bundle, test.pixels)
    singles = [row for row, scene in enumerate(test.scenes) if len(scene.things) == 1]
    return {
        "num_test_images": len(said),
        "captions_right": share_right(said, test.scenes),
        "captions_right_one_thing": share_right([said[row] for row in singles], [test.scenes[row] for row in singles]),
        "captions_readable": sum(scenes.parse(caption) is not None for caption in said) / len(said),
        "retrieval_top1_of_64": retrieval(bundle, test, num_choices=64),
        "near_miss_refused": near_miss_refused(bundle, test),
        "clip_parameters": num_parameters(bundle.clip),
        "projector_parameters": num_parameters(bundle.projector),
        "llama_parameters": num_parameters(bundle.llama),
    }


@torch.no_grad()
def captions(bundle: Bundle, pixels: Tensor) -> list[str]:
    """Greedy captions. pixels: uint8[N, 3, S, S]."""
    texts: list[str] = []
    for states in torch.split(image_states(bundle.clip, pixels), 256):
        end = bundle.tokenizer.eos_token_id
        embeds = prompts(bundle, states)
        ids: Tensor = bundle.llama.generate(  # type: ignore[misc, assignment]
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
            do_sample=False,
            max_new_tokens=40,
            pad_token_id=end,
        )
        texts += bundle.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def share_right(said: list[str], rows: list[Scene]) -> float:
    """The share of captions with every attribute and the relation right."""
    return sum(map(scenes.is_right, said, rows)) / len(rows)


@torch.no_grad()
def retrieval(bundle: Bundle, test: Labelled, *, num_choices: int) -> float:
    """How often CLIP finds an image's own caption among those of `num_choices` different scenes."""
    ids = caption_ids(test.scenes, bundle.clip_tokenizer, prefixes=(CLIPSCORE_PREFIX,))[:, 0]
    images = F.normalize(bundle.clip.visual_projection(image_states(bundle.clip, test.pixels)), dim=-1)
    texts = text_vectors(bundle.clip, ids)
    found = []
    for rows in torch.split(torch.arange(len(ids)), num_choices):
        distinct = torch.tensor(list({test.scenes[row]: int(row) for row in rows}.values()))
        if len(rows) == num_choices:
            best = (images[distinct] @ texts[distinct].T).argmax(dim=1)
            found.append((best == torch.arange(len(distinct))).float().mean().item())
    return sum(found) / len(found)


@torch.no_grad()
def near_miss_refused(bundle: Bundle, test: Labelled) -> float:
    """How often CLIP prefers an image's own caption to one that is wrong in a single point."""
    misses = [(row, miss) for row, scene in enumerate(test.scenes) for miss in scenes.near_misses(scene)]
    misses = random.Random(0).sample(misses, min(4000, len(misses)))
    rows = torch.tensor([row for row, _ in misses])
    images = F.normalize(bundle.clip.visual_projection(image_states(bundle.clip, test.pixels[rows])), dim=-1)
    own, wrong = (
        text_vectors(bundle.clip, caption_ids(said, bundle.clip_tokenizer, prefixes=(CLIPSCORE_PREFIX,))[:, 0])
        for said in ([test.scenes[row] for row, _ in misses], [miss for _, miss in misses])
    )
    return ((images * own).sum(-1) > (images * wrong).sum(-1)).float().mean().item()


def num_parameters(model: nn.Module) -> int:
    """Trained numbers, shared ones once."""
    return sum(weight.numel() for weight in model.parameters())


def model_card(figures: dict[str, float], training: Training) -> str:
    """The text of the bundle's README.md."""
    options = {name: value for name, value in asdict(training).items() if name != "out"}
    derived = {
        "options": "\n".join(f"{name} = {value}" for name, value in options.items()),
        "num_scenes": sum(1 for _ in scenes.all_scenes()),
        "example": scenes.scene_at(next(scenes.indices("test"))).captions[0],
        "minutes": figures["minutes_clip"] + figures["minutes_llama"],
    }
    return MODEL_CARD.format_map(options | figures | derived)


MODEL_CARD = """\
# Demo bundle

A CLIP, a linear projector and a LLaMA at toy size, trained from nothing on drawings made in code. It proves that the
machine works, end to end and with the real classes and file layout. **It cannot describe photographs**: show it one and
it will name shapes on a plain ground, because it has no other words.

## What it sees

One or two shapes (circle, square, triangle, cross) in six colours and two sizes, on a white, grey, black or pink
ground, as `captioner/demo/scenes.py` draws them: {num_scenes:,} scenes that differ in what they say. It answers, for
example, "{example}".

## Figures

Measured by `captioner/demo/training/train.py` with transformers alone (float32, greedy), on {num_test_images:,.0f}
held-out images: drawn, written as PNG, JPEG, WebP, GIF, BMP or TIFF, and decoded. The split follows from a hash of what
a scene says, so no description of the test was ever trained on.

| figure | value |
|---|---|
| captions with every attribute and the relation right | {captions_right:.2%} |
| ... where there is a single thing | {captions_right_one_thing:.2%} |
| captions that are sentences of this world | {captions_readable:.2%} |
| CLIP: own caption found among those of 64 scenes | {retrieval_top1_of_64:.2%} |
| CLIP: own caption preferred to one that is wrong in a single point | {near_miss_refused:.2%} |
| parameters of CLIP (both towers) | {clip_parameters:,.0f} |
| parameters of the projector | {projector_parameters:,.0f} |
| parameters of LLaMA | {llama_parameters:,.0f} |

## How it was made

`python -m captioner.demo.training.train captioner/demo/bundle`: {minutes:.0f} minutes of wall clock on {num_threads}
CPU thread ({minutes_clip:.0f} for CLIP with the drawing, {minutes_llama:.0f} for LLaMA), in two stages on
{num_images:,} images:

1. **CLIP**, {clip_steps:,} steps of {batch_size} images: its contrastive loss, where each image also meets captions
   that are wrong in a single point, plus *linear heads that name every attribute from the CLS state*. The heads are
   dense supervision that captions alone would give more slowly; they are not in the bundle. Half of the captions begin
   with CLIPScore's "A photo depicts ".
2. **LLaMA and projector**, {llama_steps:,} steps of {batch_size} captions, on the CLS states (`pooler_output`) of the
   finished CLIP. The prompt is the start token and one projected image; four heads share two of keys and values.

There was no joint fine-tuning, no pretrained weight and no photograph.

```
{options}
```
"""
