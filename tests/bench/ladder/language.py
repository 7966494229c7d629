"""The language model of the ladder: it writes captions from bags of its own words, and never sees an image.

In place of an image it reads a grid of 1 to 64 cells, each a weighted sum of the embeddings of the words that are true
there: colours, forms and places of the shapes that the cell covers, and the ground. Of one cell for all it can
only guess which colour goes with which form and place; of many it can tell. So it is a reader of as many image tokens
as a rung gives, before any projector exists. It is frozen from then on.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from captioner.demo import scenes
from captioner.demo.training import tokens
from captioner.demo.training.models import new_llama
from captioner.demo.training.options import Training
from captioner.demo.training.train import Optimizer, log
from tests.bench.ladder.world import (
    JITTER_PX,
    PLACES,
    RADIUS_PX,
    SIDE_PX,
    Crowd,
    centre_of,
    crowds,
    share_of_statements,
)

PATCHES = 8
"""On a side of the grid, as the tower's."""

WORDS = (*scenes.COLOURS, *scenes.SHAPES, *PLACES.values(), *scenes.BACKGROUNDS)
GRIDS = {(1, 1): 3, (2, 2): 1, (2, 4): 2, (3, 3): 2, (4, 4): 4, (8, 8): 2}
"""Rows and columns of cells -> how often a batch has them."""

LIST = (0, 6)
"""In the first steps there is no grid but six cells, of which each shape has one for itself, in any order."""

_BATCH, _RATE, _MAX_CAPTION = 64, 3e-3, 48
_WIDTH, _LAYERS = 64, 4
_FIRST = 0.4  # of the steps: one cell for all teaches nothing of what goes with what


def train(folder: Path, num_steps: int, *, seed: int = 0) -> None:
    """Train a LLaMA of some 200,000 parameters and save it with its tokenizer."""
    torch.manual_seed(seed)
    source = iter(crowds("train", 1 << 40, seed=seed + 1))
    texts = [next(source).caption for _ in range(5000)]
    tokenizer = tokens.llama_tokenizer(texts, vocab_size=384, max_length=256)
    llama = new_llama(Training(out=folder, llama_width=_WIDTH, llama_layers=_LAYERS), tokenizer)
    for weight in llama.parameters():
        if weight.ndim > 1:  # transformers' 0.02 is for wide models: at this width attention would begin next to even
            torch.nn.init.normal_(weight, std=_WIDTH**-0.5)
    optimizer, rng = Optimizer(list(llama.parameters()), _RATE, num_steps), random.Random(seed)
    for step in range(num_steps):
        batch = [next(source) for _ in range(_BATCH)]
        grids = GRIDS if step > _FIRST * num_steps else {LIST: 1}
        loss = caption_loss(llama, tokenizer, batch, rng.choices([*grids], [*grids.values()])[0], rng)
        optimizer.step(loss)
        if (step + 1) % 100 == 0:
            checked = [next(source) for _ in range(32)]
            grids = (LIST, (1, 1), (4, 4), (8, 8))
            right = {f"{h}x{w}": share_right(llama, tokenizer, checked, (h, w), rng) for h, w in grids}
            log("language", step=step + 1, loss=loss.item(), **right)
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def caption_loss(
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batch: Sequence[Crowd],
    grid: tuple[int, int],
    rng: random.Random,
) -> Tensor:
    """Mean cross-entropy of the captions and their end tokens, given the cells."""
    prefix = prefixes(llama, tokenizer, batch, grid, rng)
    end = tokenizer.eos_token_id
    ids = [
        torch.tensor([*row, end])
        for row in tokenizer([one.caption for one in batch], add_special_tokens=False).input_ids
    ]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    read = llama.get_input_embeddings()(padded[:, :-1].clamp(min=0))
    states = llama.model(inputs_embeds=torch.cat([prefix, read], dim=1), use_cache=False).last_hidden_state
    logits = llama.lm_head(states[:, prefix.shape[1] - 1 :])
    return F.cross_entropy(logits.flatten(0, 1), padded.flatten())


@torch.no_grad()
def share_right(
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batch: Sequence[Crowd],
    grid: tuple[int, int],
    rng: random.Random,
) -> float:
    """The share of statements in greedy captions that are right, given the cells."""
    prefix = prefixes(llama, tokenizer, batch, grid, rng)
    ids = llama.generate(
        inputs_embeds=prefix,
        attention_mask=torch.ones(prefix.shape[:2], dtype=torch.int64),
        do_sample=False,
        max_new_tokens=_MAX_CAPTION,
        pad_token_id=tokenizer.eos_token_id,
    )
    said = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(map(share_of_statements, said, batch)) / len(batch)


def prefixes(
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batch: Sequence[Crowd],
    grid: tuple[int, int],
    rng: random.Random,
) -> Tensor:
    """float[B, 1 + cells, D]: the start token, then the cells in rows, each at a loudness of its own and with noise."""
    embed = llama.get_input_embeddings()
    words = embed(torch.tensor([tokenizer(f" {word}", add_special_tokens=False).input_ids for word in WORDS])[:, 0])
    bags = torch.stack([torch.from_numpy(cell_words(crowd, grid, rng)) for crowd in batch])
    loudness = 0.6 + 0.9 * torch.rand(*bags.shape[:2], 1)
    cells = loudness * (bags @ words)
    cells = cells + 0.1 * words.detach().std() * torch.randn_like(cells)
    start = embed(torch.tensor(tokenizer.bos_token_id)).expand(len(batch), 1, -1)
    return torch.cat([start, cells], dim=1)


def cell_words(crowd: Crowd, grid: tuple[int, int], rng: random.Random) -> np.ndarray:
    """float32[cells, words]: how much each word is true in each cell; the shape that covers it most counts as 1."""
    pooled = _listed(crowd, rng) if grid == LIST else _pooled(crowd, grid, rng)
    share = pooled / np.maximum(pooled.max(axis=0), 0.02)
    bags = np.zeros((share.shape[1], len(WORDS)), np.float32)
    for shape, weights in zip(crowd.shapes, share, strict=True):
        for word in (shape.colour, shape.form, shape.place):
            bags[:, WORDS.index(word)] += weights
    bags[:, WORDS.index(crowd.ground)] = 1
    return bags


def _listed(crowd: Crowd, rng: random.Random) -> np.ndarray:
    """float32[shapes, cells]: 1 where a shape has its cell."""
    places = rng.sample(range(LIST[1]), len(crowd.shapes))
    return np.eye(LIST[1], dtype=np.float32)[places]


def _pooled(crowd: Crowd, grid: tuple[int, int], rng: random.Random) -> np.ndarray:
    """float32[shapes, cells]: how much of each cell a shape covers."""
    covered = np.stack([coverage(centre_of(shape), rng) for shape in crowd.shapes])
    return F.adaptive_avg_pool2d(torch.from_numpy(covered), grid).flatten(1).numpy()


def coverage(centre: tuple[float, float], rng: random.Random) -> np.ndarray:
    """float32[8, 8]: about how much of each patch a shape covers."""
    middles = (np.arange(PATCHES, dtype=np.float32) + 0.5) * (SIDE_PX / PATCHES)
    x, y = (at + rng.uniform(-JITTER_PX, JITTER_PX) for at in centre)
    distance = np.hypot(middles[None, :] - x, middles[:, None] - y)
    return np.clip((RADIUS_PX + 4 - distance) / 8, 0, 1).astype(np.float32)
