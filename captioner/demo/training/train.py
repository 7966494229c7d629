"""Train the demo bundle from nothing on the labelled scenes, and measure it on descriptions that it never saw.

Two stages. CLIP first: the contrastive loss, and beside it linear heads that name every attribute from the CLS state;
they are thrown away. Then LLaMA with the projector, on the CLS states of the frozen tower, which are computed once.
The measurement too uses transformers' classes alone, so it can stand witness for this package's model code.

    python -m captioner.demo.training.train captioner/demo/bundle
"""

import json
import math
import random
import sys
import time
from collections.abc import Iterator

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPModel,
)

from captioner.demo import scenes
from captioner.demo.scenes import Scene
from captioner.demo.training.measurement import captions, measure, model_card, share_right
from captioner.demo.training.models import (
    CLIPSCORE_PREFIX,
    Bundle,
    Labelled,
    caption_ids,
    image_states,
    normalise,
    prompts,
    text_vectors,
)
from captioner.demo.training.options import Training

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
    """For each scene one of the same split that differs in one thing said, drawn at random."""
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


def one_of_each(ids: Tensor, rows: Tensor) -> Tensor:
    """int64[B, L]: one caption of each of these rows, drawn at random."""
    return ids[rows, torch.randint(ids.shape[1], (len(rows),))]


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


def log(event: str, **values: float) -> None:
    """One line on stderr."""
    words = " ".join(f"{name}={value:.4g}" for name, value in values.items())
    print(f"{time.strftime('%H:%M:%S')} event={event} {words}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(tyro.cli(Training))
