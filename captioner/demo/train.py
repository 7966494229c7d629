"""Train the demo bundle from nothing on the labelled scenes, and measure it on descriptions that it never saw.

Two stages. CLIP first: the contrastive loss, and beside it linear heads that name every attribute from the CLS state;
they are thrown away. Then LLaMA with the projector, on the CLS states of the frozen tower, which are computed once.
The measurement too uses transformers' classes alone, so it can stand witness for this package's model code.

    python -m captioner.demo.train captioner/demo/bundle
"""

import io
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
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

from captioner.demo import scenes, tokens
from captioner.demo.scenes import Scene, Split
from captioner.model.bundle import save_bundle
from captioner.model.projector import ProjectorConfig

IMAGE_SIZE = 64
MAX_TEXT_TOKENS = 64
PROVENANCE = {"made_by": "python -m captioner.demo.train", "data": "captioner.demo.scenes, split train"}
ATTRIBUTES: tuple[tuple[str, ...], ...] = (
    tuple(scenes.BACKGROUNDS),
    (*scenes.PLACES, *scenes.RELATIONS),
    tuple(scenes.SIZES),
    tuple(scenes.COLOURS),
    scenes.SHAPES,
    ("", *scenes.SIZES),
    ("", *scenes.COLOURS),
    ("", *scenes.SHAPES),
)
CLIPSCORE_PREFIX = "A photo depicts "
"""CLIPScore (arXiv:2104.08718) puts this before every caption, so the text tower reads half of its captions with it."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the demo bundle is trained."""

    out: tyro.conf.Positional[Path]
    """Folder of the bundle."""
    seed: int = 0
    """Of the weights, the batches and the scenes."""
    num_images: int = 40_000
    """Training images; a description comes back about three times, drawn differently."""
    num_test_images: int = 1_500
    """Held-out images of the final measurement."""
    batch_size: int = 128
    clip_steps: int = 1_500
    """Optimizer steps of the two CLIP towers."""
    clip_learning_rate: float = 1e-3
    clip_width: int = 128
    clip_layers: int = 4
    patch_size: int = 16
    llama_steps: int = 2_500
    """Optimizer steps of LLaMA and the projector."""
    llama_learning_rate: float = 2e-3
    llama_width: int = 128
    llama_layers: int = 5
    num_threads: int = 1
    """Of torch; more help only where nothing else runs."""
    log_every: int = 100
    """Steps between two lines of progress on stderr."""


def main(training: Training) -> None:
    """Write the bundle and its model card; the last line on stdout is the measurement as JSON."""
    torch.manual_seed(training.seed)
    torch.set_num_threads(training.num_threads)
    started = time.monotonic()
    train = Labelled.draw("train", training.num_images, seed=training.seed)
    validation = Labelled.draw("validation", 512, seed=training.seed)
    bundle = Bundle.new(training, [caption for scene in train.scenes[:5000] for caption in scene.captions])
    fit_clip(bundle, train, validation, training)
    clip_done = time.monotonic()
    fit_llama(bundle, train, validation, training)
    minutes = {"minutes_clip": (clip_done - started) / 60, "minutes_llama": (time.monotonic() - clip_done) / 60}
    bundle.save(training.out)
    test = Labelled.draw("test", training.num_test_images, seed=training.seed)
    figures = measure(bundle, test) | minutes
    (training.out / "README.md").write_text(model_card(figures, training), encoding="utf-8")
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))  # noqa: T201


# ---------------------------------------------------------------------------------------------------- labelled images


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


def one_of_each(ids: Tensor, rows: Tensor) -> Tensor:
    """int64[B, L]: one caption of each of these rows, by lot."""
    return ids[rows, torch.randint(ids.shape[1], (len(rows),))]


# ---------------------------------------------------------------------------------------------------------- the bundle


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


def num_parameters(model: nn.Module) -> int:
    """Trained numbers, shared ones once."""
    return sum(weight.numel() for weight in model.parameters())


# -------------------------------------------------------------------------------------------------------- optimization


def fit_clip(bundle: Bundle, train: Labelled, validation: Labelled, training: Training) -> None:
    """Train both towers: captions to their images, and every attribute from the CLS state."""
    clip, heads = bundle.clip, AttributeHeads(training.clip_width)
    ids = caption_ids(train.scenes, bundle.clip_tokenizer, prefixes=("", CLIPSCORE_PREFIX))
    wrong_ids = caption_ids(nearly(train.scenes), bundle.clip_tokenizer, prefixes=("", CLIPSCORE_PREFIX))
    attributes = attribute_classes(train.scenes)
    optimizer = Optimizer([*clip.parameters(), *heads.parameters()], training.clip_learning_rate, training.clip_steps)
    for step, rows in batches(len(ids), training.batch_size, training.clip_steps):
        states = clip.vision_model(pixel_values=normalise(train.pixels[rows])).pooler_output
        contrast = contrastive_loss(clip, states, one_of_each(ids, rows), one_of_each(wrong_ids, rows))
        naming = heads.loss(states, attributes[rows])
        optimizer.step(contrast + naming)
        if (step + 1) % training.log_every == 0:
            named = heads.share_right(image_states(clip, validation.pixels), attribute_classes(validation.scenes))
            log("clip", step=step + 1, contrastive=contrast.item(), attributes=naming.item(), named_right=named)


def fit_llama(bundle: Bundle, train: Labelled, validation: Labelled, training: Training) -> None:
    """Train LLaMA and the projector on the states of the finished tower."""
    states = image_states(bundle.clip, train.pixels)
    ids = caption_ids(train.scenes, bundle.tokenizer, end="<|end_of_text|>")
    weights = [*bundle.llama.parameters(), *bundle.projector.parameters()]
    optimizer = Optimizer(weights, training.llama_learning_rate, training.llama_steps)
    for step, rows in batches(len(ids), training.batch_size, training.llama_steps):
        loss = caption_loss(bundle, states[rows], one_of_each(ids, rows))
        optimizer.step(loss)
        if (step + 1) % training.log_every == 0:
            right = share_right(captions(bundle, validation.pixels), validation.scenes)
            log("llama", step=step + 1, loss=loss.item(), captions_right=right)


def batches(num_rows: int, batch_size: int, num_steps: int) -> Iterator[tuple[int, Tensor]]:
    """`num_steps` times the step and int64[batch_size] row numbers; each row once an epoch."""
    rows = torch.randperm(num_rows)
    for step in range(num_steps):
        if len(rows) < batch_size:
            rows = torch.randperm(num_rows)
        yield step, rows[:batch_size]
        rows = rows[batch_size:]


class Optimizer:
    """AdamW with a short warm-up, a cosine to nothing and clipped gradients."""

    def __init__(self, weights: list[nn.Parameter], learning_rate: float, num_steps: int) -> None:
        self.weights = weights
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.05},
            {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
        warmup = max(1, num_steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        )

    def step(self, loss: Tensor) -> None:
        """One update against this loss."""
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.adamw.step()
        self.schedule.step()


def contrastive_loss(clip: CLIPModel, states: Tensor, ids: Tensor, wrong_ids: Tensor) -> Tensor:
    """CLIP's own loss (arXiv:2103.00020) over a batch, where an image also meets the batch's nearly right captions.

    states: float[B, W]; ids, wrong_ids: int64[B, L]."""
    images = F.normalize(clip.visual_projection(states), dim=-1)
    texts = torch.cat([text_vectors(clip, ids), text_vectors(clip, wrong_ids)])
    similarity = clip.logit_scale.clamp(max=math.log(100)).exp() * images @ texts.T
    pairs = torch.arange(len(ids))
    return (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity[:, : len(ids)].T, pairs)) / 2


def nearly(rows: list[Scene]) -> list[Scene]:
    """For each scene one of the same split that differs in one thing said, by lot."""
    lots = random.Random(0)
    missed = []
    for scene in rows:
        candidates = list(scenes.near_misses(scene))
        lots.shuffle(candidates)
        missed.append(next(candidate for candidate in candidates if candidate.split == scene.split))
    return missed


def caption_loss(bundle: Bundle, states: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the captions and of one end token each. states: float[B, W]; ids: int64[B, L]."""
    embedded = bundle.llama.get_input_embeddings()(ids[:, :-1])
    logits = bundle.llama(inputs_embeds=torch.cat([prompts(bundle, states), embedded], dim=1)).logits[:, 1:]
    # Filled up with end tokens: the first one is the caption's, those behind it are not.
    is_end = ids == bundle.tokenizer.eos_token_id
    labels = ids.masked_fill(is_end.cumsum(1) > 1, -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def prompts(bundle: Bundle, states: Tensor) -> Tensor:
    """float[B, 2, D]: the start token, then the projected image."""
    start = bundle.llama.get_input_embeddings()(torch.tensor(bundle.tokenizer.bos_token_id))
    return torch.stack([start.expand(len(states), -1), bundle.projector(states)], dim=1)


class AttributeHeads(nn.Module):
    """Linear maps that name each attribute from the CLS state. Scaffolding: not part of the bundle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, len(names)) for names in ATTRIBUTES)

    def loss(self, states: Tensor, classes: Tensor) -> Tensor:
        """Cross-entropy, summed over the attributes. states: float[B, W]; classes: int64[B, A]."""
        each = [F.cross_entropy(head(states), classes[:, column]) for column, head in enumerate(self.heads)]
        return torch.stack(each).sum()

    @torch.no_grad()
    def share_right(self, states: Tensor, classes: Tensor) -> float:
        """The share of images with every attribute named right."""
        named = torch.stack([head(states).argmax(-1) for head in self.heads], dim=1)
        return (named == classes).all(dim=1).float().mean().item()


def attribute_classes(rows: list[Scene]) -> Tensor:
    """int64[N, A]: each scene in the order of `ATTRIBUTES`; a scene of one thing lacks the last three."""
    described = []
    for scene in rows:
        values = [scene.background, scene.layout]
        values += [value for thing in scene.things for value in (thing.size, thing.colour, thing.shape)]
        values += [""] * (len(ATTRIBUTES) - len(values))
        described.append([names.index(value) for names, value in zip(ATTRIBUTES, values, strict=True)])
    return torch.tensor(described)


# -------------------------------------------------------------------------------------------------------- measurement


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


@torch.no_grad()
def image_states(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """float[N, W]: the normalised CLS states, as the captioner will read them."""
    parts = [clip.vision_model(pixel_values=normalise(part)).pooler_output for part in torch.split(pixels, 256)]
    return torch.cat(parts)


def text_vectors(clip: CLIPModel, ids: Tensor) -> Tensor:
    """float[B, P], of length one. ids: int64[B, L], filled up with the end token; CLIP reads the state at the first."""
    return F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)


def log(event: str, **values: float) -> None:
    """One line on stderr."""
    words = " ".join(f"{name}={value:.4g}" for name, value in values.items())
    print(f"{time.strftime('%H:%M:%S')} event={event} {words}", file=sys.stderr, flush=True)  # noqa: T201


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

Measured by `captioner/demo/train.py` with transformers alone (float32, greedy), on {num_test_images:,.0f} held-out
images: drawn, written as PNG, JPEG, WebP, GIF, BMP or TIFF, and decoded. The split follows from a hash of what a scene
says, so no description of the test was ever trained on.

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

`python -m captioner.demo.train captioner/demo/bundle`: {minutes:.0f} minutes of wall clock on {num_threads} CPU thread
({minutes_clip:.0f} for CLIP with the drawing, {minutes_llama:.0f} for LLaMA), in two stages on {num_images:,} images:

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


if __name__ == "__main__":
    main(tyro.cli(Training))
