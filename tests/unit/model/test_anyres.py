"""The tokens of an image in tiles are packed as transformers' LLaVA-NeXT and LLaVA-OneVision pack them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextModel,
    LlavaOnevisionConfig,
    LlavaOnevisionModel,
    SiglipVisionConfig,
)

from captioner.model.anyres import AnyRes
from captioner.model.tile_packer import packed

TILE, PATCHES, WIDTH = 32, 4, 6
NEXT_GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
ONEVISION_GRIDS = [[TILE * rows, TILE * columns] for rows in range(1, 5) for columns in range(1, 5)]
TOWER = {
    "image_size": TILE,
    "patch_size": TILE // PATCHES,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 4,
}
TEXT = LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    vocab_size=8,
)


def anyres(grids: list[list[int]], most_tiles: int | None = None) -> AnyRes:
    resolutions = tuple((height, width) for height, width in grids)
    return AnyRes(resolutions=resolutions, tile_size=TILE, patches=PATCHES, most_tiles=most_tiles)


@pytest.fixture(scope="module")
def llava_next() -> LlavaNextModel:
    config = LlavaNextConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=TEXT, image_grid_pinpoints=NEXT_GRIDS)
    return LlavaNextModel(config).eval()


@pytest.fixture(scope="module")
def onevision() -> LlavaOnevisionModel:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER), text_config=TEXT, image_grid_pinpoints=ONEVISION_GRIDS
    )
    return LlavaOnevisionModel(config).eval()


def sizes(number: int) -> Iterator[tuple[int, int]]:
    """Width and height of images from 1:10 to 10:1, and stranger ones."""
    random = np.random.default_rng(0)
    for _ in range(number):
        area, shape = np.exp(random.uniform(3, 7)), np.exp(random.uniform(-np.log(10), np.log(10)) / 2)
        yield max(1, int(area * shape)), max(1, int(area / shape))
    yield from [(1, 1), (32, 32), (64, 64), (1000, 1), (1, 1000), (333, 334), (96, 31)]


def features(found: AnyRes, width: int, height: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width * height)
    return torch.randn(found.num_tiles(width, height), PATCHES**2, WIDTH, generator=generator)


NEWLINE = torch.linspace(-1, 1, WIDTH)


def theirs(model: Any, patches: torch.Tensor, width: int, height: int, **options: Any) -> torch.Tensor:
    found, lengths = model.pack_image_features(
        [patches], torch.tensor([[height, width]]), image_newline=NEWLINE, **options
    )
    assert lengths.tolist() == [len(found[0])]
    result: torch.Tensor = found[0]
    return result


def test_tiles_are_packed_as_llava_next_packs_them(llava_next: LlavaNextModel) -> None:
    ours = anyres(NEXT_GRIDS)
    for width, height in sizes(200):
        patches = features(ours, width, height)
        expected = theirs(llava_next, patches, width, height, vision_feature_select_strategy="default")
        assert torch.equal(packed(patches, NEWLINE, ours, width, height), expected), (width, height)
        assert ours.num_tokens(width, height) == len(expected) <= ours.most_tokens


@pytest.mark.parametrize("most_tiles", [1, 4, 9])
def test_tiles_are_packed_as_onevision_packs_them(onevision: LlavaOnevisionModel, most_tiles: int) -> None:
    ours = anyres(ONEVISION_GRIDS, most_tiles)
    for width, height in sizes(200):
        if int(min(width, height) / max(width, height) * 4 * PATCHES) == 0:
            continue  # thinner than a patch: transformers fails
        patches = features(ours, width, height)
        expected = theirs(onevision, patches, width, height, vision_aspect_ratio=f"anyres_max_{most_tiles}")
        assert torch.equal(packed(patches, NEWLINE, ours, width, height), expected), (width, height)
        assert ours.num_tokens(width, height) == len(expected) <= ours.most_tokens


def test_most_tokens_are_those_of_a_full_grid() -> None:
    llava_next = AnyRes(
        resolutions=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), tile_size=336, patches=24
    )
    assert llava_next.most_tokens == 576 + 48 * 49 == llava_next.num_tokens(1000, 1000)
    assert llava_next.num_tokens(1000, 100) == 576 + 8 * 73


def test_an_image_thinner_than_a_patch_has_the_tokens_of_the_whole_image_at_least() -> None:
    for ours in (anyres(NEXT_GRIDS), anyres(ONEVISION_GRIDS, 9)):
        for size in [(5000, 1), (1, 5000)]:
            patches = features(ours, *size)
            tokens = packed(patches, NEWLINE, ours, *size)
            assert len(tokens) == ours.num_tokens(*size) >= PATCHES**2
            assert torch.equal(tokens[: PATCHES**2], patches[0])
