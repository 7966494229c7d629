"""The original LLaVA's layout gives what the converted checkpoint gives, and says what it cannot read."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from captioner.errors import BundleError, ShapeError
from captioner.images.preprocessing import Preprocessing
from captioner.model.bundle import describe, load
from tests.unit.model import tiny_models
from tests.unit.model.original_llava import save_original
from tests.unit.model.test_model_oracle import greedy, pixels
from tests.unit.model.test_published_captioners import LENGTH, expected_tokens
from tests.unit.model.tiny_models import clip_config, edit_json, save_llava, siglip_config

PROMPT = "<|begin_of_text|>USER: {image}\nWhy? ASSISTANT:"


def converted(folder: Path, tower: PretrainedConfig, language: str) -> Path:
    is_siglip = tower.model_type == "siglip_vision_model"
    return save_llava(
        folder,
        vision=tower,
        language=tiny_models.language_config(language),
        vision_feature_select_strategy="full" if is_siglip else "default",
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    converted(folder / "converted", clip_config().vision_config, "llama")
    save_original(folder / "converted", folder / "original", tower=None)
    return folder


@pytest.fixture
def original(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint with its tower in the weights."""
    return Path(shutil.copytree(saved / "original", tmp_path / "original"))


@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "named"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("language", ["llama", "mistral", "qwen2"])
def test_the_original_layout_gives_the_tokens_of_the_converted_one(
    tmp_path: Path, tower: str, language: str, is_inside: bool
) -> None:
    config = {"clip": clip_config().vision_config, "siglip": siglip_config()}[tower]
    theirs = converted(tmp_path / "converted", config, language)
    folder = save_original(theirs, tmp_path / "original", tower=None if is_inside else tmp_path / "tower")
    model = load(str(folder), device="cpu", prompt=PROMPT)
    assert greedy(model, pixels(), LENGTH) == expected_tokens(theirs, model, pixels())
    ours = load(str(theirs), device="cpu", prompt=PROMPT)
    assert torch.equal(model.encode(pixels()), ours.encode(pixels()))


def test_the_tower_is_the_users_where_one_is_named(saved: Path, tmp_path: Path) -> None:
    folder = save_original(saved / "converted", tmp_path / "original", tower=tmp_path / "tower")
    before = describe(str(folder)).fingerprint
    shutil.move(tmp_path / "tower", tmp_path / "moved")
    with pytest.raises(BundleError, match=r"the vision tower that \S+ names cannot be opened: .* --vision-tower"):
        describe(str(folder))
    assert describe(str(folder), vision_tower=str(tmp_path / "moved")).fingerprint == before
    edit_json(folder / "config.json", mm_vision_tower=None)
    with pytest.raises(BundleError, match=r"has mm_vision_tower None; expected the name of a vision tower, or one by"):
        describe(str(folder))


def test_a_tower_without_its_last_layer_and_head_is_read_up_to_the_layer_it_has(tmp_path: Path) -> None:
    """LLaVA deletes both from SigLIP, and reads the last that is left."""
    theirs = converted(tmp_path / "converted", siglip_config(), "qwen2")
    folder = save_original(theirs, tmp_path / "original", tower=None)
    tensors = load_file(folder / "model.safetensors")
    gone = re.compile(r"model\.vision_tower\..*(encoder\.layers\.2\.|\.head\.)")
    save_file({n: t for n, t in tensors.items() if not gone.match(n)}, folder / "model.safetensors")
    model = load(str(folder), device="cpu", prompt=PROMPT)
    assert greedy(model, pixels(), LENGTH) == expected_tokens(theirs, model, pixels())
    edit_json(folder / "config.json", mm_vision_select_layer=-1)
    with pytest.raises(BundleError, match=r"do not fit SiglipVisionModel as its config .* missing encoder.layers.2"):
        describe(str(folder), prompt=PROMPT)


def test_a_linear_projector_is_applied_to_each_patch(original: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    linear = torch.nn.Linear(48, 64)
    kept = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
    own = {f"model.mm_projector.{name}": tensor.detach() for name, tensor in linear.named_parameters()}
    save_file({**kept, **own}, original / "model.safetensors")
    edit_json(original / "config.json", mm_projector_type="linear")
    model = load(str(original), device="cpu", prompt=PROMPT)
    torch.testing.assert_close(model.encode(pixels()), linear(model.features(pixels())).detach())


def test_a_model_type_of_llava_with_a_named_tower_is_the_original(original: Path) -> None:
    before = describe(str(original)).fingerprint
    edit_json(original / "config.json", model_type="llava")
    assert describe(str(original)).fingerprint == before


def test_a_tokenizer_can_be_named(original: Path, saved: Path) -> None:
    before = describe(str(original)).fingerprint
    (original / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"has no tokenizer: expected tokenizer.json, or .* by --tokenizer"):
        describe(str(original))
    named = str(saved / "converted")
    assert describe(str(original), tokenizer=named).fingerprint == before
    assert load(str(original), device="cpu", tokenizer=named).text([*b"abc"])


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(pattern: str) -> Any:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({n: t for n, t in tensors.items() if not re.search(pattern, n)}, folder / "model.safetensors")

    return change


def another_width(folder: Path) -> None:
    tower = Path(json.loads((folder / "config.json").read_text())["mm_vision_tower"])
    other = folder.parent / "other"
    shutil.copytree(tower, other)
    edit_json(other / "config.json", hidden_size=40, num_attention_heads=2)
    clip = tiny_models.clip_config(hidden_size=40)
    tiny_models.save_clip(other, clip)
    without(r"model\.vision_tower")(folder)
    edit_json(folder / "config.json", mm_vision_tower=str(other))


REFUSED: dict[str, tuple[Any, type[BundleError], str]] = {
    "a cut file": (cut, BundleError, r"model.safetensors is cut: it has \d+ bytes of \d+; copy it again"),
    "a pickle": (only_a_pickle, BundleError, r"only pytorch_model.bin, a pickle, which is never opened; convert it"),
    "an unknown projector": (
        lambda f: edit_json(f / "config.json", mm_projector_type="mlp4x_gelu"),
        BundleError,
        r"has mm_projector_type 'mlp4x_gelu'; supported are linear, mlp2x_gelu",
    ),
    "another projector than its tensors": (
        lambda f: edit_json(f / "config.json", mm_projector_type="linear"),
        BundleError,
        r"do not fit PatchLinearProjector as its config describes it: missing bias, weight",
    ),
    "an unknown aspect ratio": (
        lambda f: edit_json(f / "config.json", image_aspect_ratio="highres"),
        BundleError,
        r"has image_aspect_ratio 'highres'; supported are pad, square",
    ),
    "an unknown feature": (
        lambda f: edit_json(f / "config.json", mm_vision_select_feature="slicefour_patch"),
        BundleError,
        r"has mm_vision_select_feature 'slicefour_patch'; supported are patch and cls_patch",
    ),
    "another language model": (
        lambda f: edit_json(f / "config.json", model_type="llava_mpt"),
        BundleError,
        r"has model_type 'llava_mpt'; supported in the original layout are llava_llama, llava, llava_mistral",
    ),
    "a tower of another width": (
        another_width,
        ShapeError,
        r"reads image features of width 48, the CLIP in \S+other gives width 40; use the CLIP it was fitted to",
    ),
    "a missing projector": (without("mm_projector"), BundleError, r"do not fit MlpProjector .* missing linear_1.bias"),
    "a missing layer": (
        without(r"model\.layers\.1\."),
        BundleError,
        r"do not fit LlamaForCausalLM .* missing model.la",
    ),
}


@pytest.mark.parametrize("broken", REFUSED)
def test_what_cannot_be_read_is_refused_with_both_sides(original: Path, broken: str) -> None:
    change, error, message = REFUSED[broken]
    change(original)
    with pytest.raises(error, match=message):
        describe(str(original))


def test_the_original_layout_is_described_without_torch(original: Path) -> None:
    code = (
        "import sys; from captioner.model.bundle import describe; describe(sys.argv[1])\n"
        "print(*{'torch', 'transformers', 'jinja2'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(original)], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"


def test_an_image_is_padded_to_a_square_where_the_checkpoint_says_so(original: Path) -> None:
    square = describe(str(original))
    edit_json(original / "config.json", image_aspect_ratio="pad")
    padded = describe(str(original))
    assert not Preprocessing.from_config(square.preprocessing).pads
    assert Preprocessing.from_config(padded.preprocessing).pads
    assert padded.fingerprint != square.fingerprint
    edit_json(original / "config.json", image_aspect_ratio=None)
    assert describe(str(original)).fingerprint == square.fingerprint
