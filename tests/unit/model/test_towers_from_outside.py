"""A vision tower from outside the package is one entry in the table: nothing else knows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from captioner.captioning.captioner import Captioner
from captioner.config import DecodingConfig
from captioner.errors import BundleError
from captioner.model.bundle import describe, load, save_bundle
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.model.shapes import Shapes
from captioner.model.towers.table import TOWERS
from captioner.model.towers.tower import TowerConfig, TowerFamily, TowerSource
from tests.sample_images import sample_image
from tests.unit.model.tiny_models import LLAMA_WIDTH, save_llama, siglip_preprocessor, write_json


@dataclass(frozen=True, kw_only=True)
class MeanConfig(TowerConfig):
    """Patches are projected, and that is all."""

    model_type: ClassVar[str] = "made_up_vision_model"
    class_name: ClassVar[str] = "MadeUpVisionConfig"


class MeanTower(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        states: Tensor = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return states


def shapes(config: TowerConfig) -> Shapes:
    return {"patches.weight": (config.hidden_size, 3, config.patch_size, config.patch_size)}


def build(source: TowerSource, num_layers: int | None) -> nn.Module:
    return MeanTower(source.config)


def pooled(tower: Any, pixel_values: Tensor) -> Tensor:
    mean: Tensor = tower(pixel_values).mean(1)
    return mean


MADE_UP = TowerFamily(
    name="MadeUp",
    config=MeanConfig,
    has_cls=False,
    shapes=shapes,
    tensor_name=lambda name: name,
    preprocessing=lambda config: siglip_preprocessor(config.image_size),
    build=build,
    states=lambda tower, pixel_values: tower(pixel_values),
    pooled=pooled,
)


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    folder = tmp_path / "tower"
    folder.mkdir()
    settings = {"model_type": "made_up_vision_model", "hidden_size": 12, "num_hidden_layers": 0, "image_size": 32}
    write_json(folder / "config.json", settings | {"patch_size": 8})
    torch.manual_seed(0)
    save_file({"patches.weight": torch.randn(12, 3, 8, 8)}, folder / "model.safetensors")
    write_json(folder / "preprocessor_config.json", siglip_preprocessor())
    return folder


def bundle_with(tower: Path, kind: str, **settings: Any) -> str:
    folder = tower.parent / kind
    llama = str(save_llama(folder / "llama"))
    config = ProjectorConfig(kind=kind, num_features=12, width=LLAMA_WIDTH, **settings)
    save_bundle(folder, build_projector(config), config, clip=str(tower), llama=llama)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", {}),
        ("mlp", {"num_image_tokens": 16, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
    ],
)
def test_a_tower_from_outside_captions(
    tower: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(TOWERS, "made_up_vision_model", MADE_UP)
    model = load(bundle_with(tower, kind, **settings), device="cpu")
    captioner = Captioner(model, DecodingConfig(max_new_tokens=5), slots="2")
    try:
        assert [caption.num_tokens for caption in captioner.caption([sample_image()])] == [5]  # type: ignore[union-attr]
    finally:
        captioner.close()


def test_a_tower_that_is_in_no_table_is_refused_with_those_that_are(
    tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(TOWERS, "made_up_vision_model", MADE_UP)
        bundle = bundle_with(tower, "linear")
    with pytest.raises(
        BundleError,
        match=r"has model_type 'made_up_vision_model'; supported are clip, siglip and their vision towers alone",
    ):
        describe(bundle)
