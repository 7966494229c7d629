"""The vision tower of the ladder: a CLIP at toy size. Its patches know what they show, its pooled state the gist.

Linear heads name colour, form, row and column of the shape that a patch shows, from the last layer but one; two layers
name what is there from the pooled state, but not what goes with what: CLIP's pooled state, too, is much of a bag of
words (arXiv:2210.01936). The heads are thrown away.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from captioner.demo import scenes
from captioner.demo.training.models import normalise
from captioner.demo.training.train import Optimizer, batches, log
from tests.bench.ladder.language import PATCHES, coverage
from tests.bench.ladder.world import COLUMNS, NUMBERS, PLACES, ROWS, SIDE_PX, Crowd, centre_of, crowds, draw

WIDTH, LAYERS = 96, 4
OF_A_PATCH = (tuple(scenes.COLOURS), scenes.SHAPES, ROWS, COLUMNS)
"""What the heads of a patch tell apart; of each, one class more for none."""

_BATCH, _RATE = 128, 1e-3


def train(folder: Path, num_images: int, num_steps: int, *, seed: int = 0) -> None:
    """Train the tower on images of its own and save it with its preprocessing."""
    torch.manual_seed(seed)
    there = list(crowds("train", num_images, seed=seed + 2))
    pixels = torch.stack([_pixels(crowd, random.Random(f"tower:{seed}:{at}")) for at, crowd in enumerate(there)])
    patch_labels = torch.stack([patch_classes(crowd) for crowd in there])
    present, number, ground = (torch.stack(column) for column in zip(*map(gist, there), strict=True))
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=3,
            hidden_act="gelu",
            image_size=SIDE_PX,
            patch_size=SIDE_PX // PATCHES,
        )
    )
    heads = Heads(present.shape[1])
    optimizer = Optimizer([*clip.parameters(), *heads.parameters()], _RATE, num_steps)
    for step, rows in batches(num_images, _BATCH, num_steps):
        out = clip(pixel_values=normalise(pixels[rows]), output_hidden_states=True)
        of_patches, right = heads.patch_loss(out.hidden_states[-2][:, 1:], patch_labels[rows])
        of_image = heads.gist_loss(out.pooler_output, present[rows], number[rows], ground[rows])
        optimizer.step(of_patches + of_image)
        if (step + 1) % 50 == 0:
            log("tower", step=step + 1, patches=of_patches.item(), gist=of_image.item(), patches_right=right)
    clip.save_pretrained(folder)
    size = {"height": SIDE_PX, "width": SIDE_PX}
    CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size=size).save_pretrained(folder)


class Heads(nn.Module):
    """Scaffolding: not part of the tower."""

    def __init__(self, num_present: int) -> None:
        super().__init__()
        self.of_patch = nn.ModuleList(nn.Linear(WIDTH, len(names) + 1) for names in OF_A_PATCH)
        self.ground = nn.Linear(WIDTH, len(scenes.BACKGROUNDS))
        self.sizes = [num_present, len(NUMBERS), len(scenes.BACKGROUNDS)]
        self.of_image = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, sum(self.sizes)))

    def patch_loss(self, states: Tensor, classes: Tensor) -> tuple[Tensor, float]:
        """Cross-entropy of what the patches show, and how often all of it is right. classes: int64[B, P, 4]."""
        given = [head(states) for head in self.of_patch]
        loss = sum(
            F.cross_entropy(one.flatten(0, 1), classes[..., at].flatten(), weight=_class_weights(one.shape[-1]))
            for at, one in enumerate(given)
        )
        named = torch.stack([one.argmax(-1) for one in given], dim=-1)
        is_shape = (classes[..., 0] >= 0) & (classes[..., 0] < len(OF_A_PATCH[0]))
        assert isinstance(loss, Tensor)
        return loss, (named == classes).all(-1)[is_shape].float().mean().item()

    def gist_loss(self, pooled: Tensor, present: Tensor, number: Tensor, ground: Tensor) -> Tensor:
        """Loss of what is there, how many shapes there are, and the ground."""
        there, many, on = torch.split(self.of_image(pooled), self.sizes, dim=-1)
        named = F.binary_cross_entropy_with_logits(there, present)
        return 4 * named + F.cross_entropy(many, number) + F.cross_entropy(on, ground)


def _class_weights(num_classes: int) -> Tensor:
    """float[classes]: the last class is none, of which there is much, and which is easy."""
    return torch.tensor([1.0] * (num_classes - 1) + [0.1])


def _pixels(crowd: Crowd, rng: random.Random) -> Tensor:
    return torch.from_numpy(np.asarray(draw(crowd, rng)).transpose(2, 0, 1).copy())


def patch_classes(crowd: Crowd) -> Tensor:
    """int64[64, 4]: the shape that each patch shows, -100 at its edge, the last class of each head for none."""
    covered = np.stack([coverage(centre_of(shape), random.Random(0)).ravel() for shape in crowd.shapes])
    most, share = covered.argmax(axis=0), covered.max(axis=0)
    named = [[shape.colour, shape.form, shape.row, shape.column] for shape in crowd.shapes]
    classes = np.array([[names.index(word) for names, word in zip(OF_A_PATCH, row, strict=True)] for row in named])[
        most
    ]
    classes[share < 0.1] = [len(names) for names in OF_A_PATCH]
    classes[(share >= 0.1) & (share < 0.4)] = -100
    return torch.from_numpy(classes)


def gist(crowd: Crowd) -> tuple[Tensor, Tensor, Tensor]:
    """What is there, float[colours + forms + places]; the number of shapes and the ground as classes."""
    named = {word for shape in crowd.shapes for word in (shape.colour, shape.form)}
    taken = {(shape.row, shape.column) for shape in crowd.shapes}
    there = [word in named for word in (*scenes.COLOURS, *scenes.SHAPES)] + [place in taken for place in PLACES]
    number, ground = list(NUMBERS).index(len(crowd.shapes)), list(scenes.BACKGROUNDS).index(crowd.ground)
    return torch.tensor(there, dtype=torch.float32), torch.tensor(number), torch.tensor(ground)
