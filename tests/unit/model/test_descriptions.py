"""A model is described without torch and transformers, and as they describe it."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM, LlavaConfig
from transformers import LlamaConfig as TransformersLlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from captioner.demo import bundle_path
from captioner.errors import BundleError
from captioner.model.bundle import describe
from captioner.model.configs import ACTIVATIONS
from captioner.model.folder import Folder
from captioner.model.language.llama import LlamaConfig, llama_shapes
from captioner.model.language.table import read_language
from captioner.model.layouts.llava import LlavaConfig as OurLlavaConfig
from captioner.model.module import shapes_of
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.model.projector_config import KINDS
from captioner.model.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from captioner.model.towers.clip import ClipConfig, clip_shapes
from captioner.model.towers.table import read_tower
from tests.bundles import save_tiny_bundle
from tests.unit.model.tiny_models import edit_json, llama3_tokenizer, save_clip, save_llama, save_llava, write_json

LLAMA = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "an old rope_theta": LLAMA | {"rope_theta": 500000.0},
    "LLaMA 3.1": LLAMA
    | {
        "rope_theta": 500000.0,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "LLaMA 3.1 without the original length": LLAMA
    | {
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"},
        "max_position_embeddings": 4096,
    },
    "an older name of the type": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "nulls": LLAMA | {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None},
    "a head of its own width": LLAMA | {"head_dim": 32, "num_key_value_heads": 1},
    "of transformers 5": LLAMA | {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
    "biases and tied": LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "a part of each head": LLAMA | {"partial_rotary_factor": 0.5},
}
LLAMA_VALUES = [name for name in vars(LlamaConfig.read({}, where="")) if name != "raw"]
CLIP_VALUES = [name for name in vars(ClipConfig()) if name != "raw"]


def values(config: Any, names: list[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("raw", LLAMAS.values(), ids=LLAMAS)
def test_a_llama_config_is_read_as_transformers_reads_it(raw: dict[str, Any]) -> None:
    ours, theirs = LlamaConfig.read(raw, where=""), TransformersLlamaConfig.from_dict(json.loads(json.dumps(raw)))
    assert values(ours, LLAMA_VALUES) == values(theirs, LLAMA_VALUES)
    again = TransformersLlamaConfig.from_dict(ours.for_transformers())
    assert again.to_dict() == theirs.to_dict()


@pytest.mark.parametrize("raw", [raw for raw in LLAMAS.values() if raw], ids=[name for name in LLAMAS if LLAMAS[name]])
def test_the_tensors_of_a_llama_are_those_of_the_module(raw: dict[str, Any]) -> None:
    with torch.device("meta"):
        module = LlamaForCausalLM(TransformersLlamaConfig.from_dict(dict(raw)))
    assert llama_shapes(LlamaConfig.read(raw, where="")) == shapes_of(module)


CLIP = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
CLIPS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "a tower": CLIP | {"image_size": 32, "hidden_act": "gelu"},
    "grey images": CLIP | {"image_size": 36, "num_channels": 1, "layer_norm_eps": 1e-6},
}


@pytest.mark.parametrize("raw", CLIPS.values(), ids=CLIPS)
def test_a_vision_config_is_read_as_transformers_reads_it(raw: dict[str, Any]) -> None:
    theirs = CLIPVisionConfig.from_dict(dict(raw))
    ours = ClipConfig.read(raw, where="")
    assert values(ours, CLIP_VALUES) == values(theirs, CLIP_VALUES)
    with torch.device("meta"):
        module = CLIPVisionModel(theirs)
    assert clip_shapes(ours) == shapes_of(getattr(module, "vision_model", module))


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"vision_config": CLIP},
        {"vision_config": CLIP, "vision_config_dict": {"hidden_size": 96}},
        {"vision_config": None, "vision_config_dict": CLIP},
        {"vision_config": CLIP, "vision_config_dict": None},
    ],
    ids=["nothing said", "one config", "two configs of 2021", "the older alone", "the older null"],
)
def test_the_vision_tower_of_a_whole_clip_is_read_as_transformers_reads_it(raw: dict[str, Any]) -> None:
    theirs = CLIPConfig.from_dict(json.loads(json.dumps(raw))).vision_config
    assert values(ClipConfig.read_whole(raw, where=""), CLIP_VALUES) == values(theirs, CLIP_VALUES)


@pytest.mark.parametrize("raw", [{}, {"vision_config": CLIP, "text_config": LLAMA | {"tie_word_embeddings": True}}])
def test_the_parts_of_a_llava_are_read_as_transformers_reads_them(raw: dict[str, Any]) -> None:
    theirs, ours = LlavaConfig.from_dict(json.loads(json.dumps(raw))), OurLlavaConfig.read(raw, where="")
    vision, text = ClipConfig.read(ours.vision_config, where=""), LlamaConfig.read(ours.text_config, where="")
    assert values(vision, CLIP_VALUES) == values(theirs.vision_config, CLIP_VALUES)
    assert values(text, LLAMA_VALUES) == values(theirs.text_config, LLAMA_VALUES)
    assert ours.vision_feature_layer == theirs.vision_feature_layer
    assert (ours.tie_word_embeddings or text.tie_word_embeddings) == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'; expected int, as 4096"),
        ({"hidden_act": "wiggle"}, "hidden_act is 'wiggle'; expected one of gelu,"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "of type llama3 lack low_freq_factor, high_freq"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type is 'spiral'; expected one of default,"),
    ],
)
def test_a_llama_config_that_cannot_be_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=f"^here/config.json is not a valid LlamaConfig: .*{message}"):
        LlamaConfig.read(raw, where="here")


def test_names_of_activations_and_rotary_embeddings_are_those_of_transformers() -> None:
    assert set(ACT2FN) == ACTIVATIONS
    for kind in ROPE_INIT_FUNCTIONS:
        keys = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "short_factor": [], "long_factor": []}
        assert LlamaConfig.read({"rope_scaling": {"rope_type": kind} | keys}, where="").rope_parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_tensors_of_a_projector_are_those_of_its_module(kind: str, has_bias: bool) -> None:
    config = ProjectorConfig(kind=kind, num_features=6, width=4, num_image_tokens=4, has_bias=has_bias)
    module = build_projector(config)
    assert config.shapes == shapes_of(module)
    assert KINDS[kind].module == type(module).__name__


def demo(folder: Path) -> Path:
    return bundle_path()


def tiny(folder: Path) -> Path:
    return Path(save_tiny_bundle(folder))


def parts_of(folder: Path, **options: Any) -> Path:
    save_clip(folder / "clip")
    save_llama(folder / "llama", **options)
    return folder


def sharded(folder: Path) -> Path:
    return parts_of(folder, max_shard_size="50KB")


def old(folder: Path) -> Path:
    parts_of(folder)
    file = folder / "llama" / "config.json"
    rope = json.loads(file.read_text())["rope_parameters"]
    edit_json(file, rope_parameters=None, rope_theta=rope["rope_theta"], head_dim=None)
    return folder


@pytest.mark.parametrize("made", [demo, tiny, sharded, old])
def test_fingerprints_are_those_of_transformers_configs_and_tokenizer(
    tmp_path: Path, made: Callable[[Path], Path]
) -> None:
    folder = made(tmp_path)
    llama = read_language(Folder.local(folder / "llama"), template="")
    theirs = TransformersLlamaConfig.from_dict(json.loads((folder / "llama" / "config.json").read_text()))
    tokenizer: Any = load_tokenizer(llama.folder)
    assert llama.fingerprint() == replace(llama, config=theirs, tokenizer=tokenizer).fingerprint()
    clip = read_tower(Folder.local(folder / "clip"))
    raw = json.loads((folder / "clip" / "config.json").read_text())
    vision: Any = (
        CLIPConfig.from_dict(raw).vision_config if raw["model_type"] == "clip" else CLIPVisionConfig.from_dict(raw)
    )
    assert clip.fingerprint() == replace(clip, config=vision).fingerprint()


TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "as saved": lambda f: None,
    "without a config": lambda f: (f / "tokenizer_config.json").unlink(),
    "a pad token that is new": lambda f: edit_json(f / "tokenizer_config.json", pad_token="<|pad|>"),
    "added tokens by number": lambda f: edit_json(
        f / "tokenizer_config.json",
        added_tokens_decoder={
            "256": {
                "content": "<|begin_of_text|>",
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
                "special": True,
            }
        },
    ),
    "an added token of another kind": lambda f: edit_json(
        f / "tokenizer_config.json", added_tokens_decoder={"256": {"content": "<|begin_of_text|>", "lstrip": True}}
    ),
    "a map of special tokens": lambda f: write_json(
        f / "special_tokens_map.json", {"eos_token": {"content": "<|eot_id|>", "lstrip": False}}
    ),
    "more special tokens": lambda f: edit_json(f / "tokenizer_config.json", additional_special_tokens=["<|new|>"]),
    "added tokens of old": lambda f: write_json(f / "added_tokens.json", {"<|old|>": 272}),
    "truncation and padding": lambda f: edit_json(
        f / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
    ),
}


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_is_the_one_that_transformers_makes_of_its_files(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    llama3_tokenizer().save_pretrained(tmp_path)
    change(tmp_path)
    ours, theirs = read_tokenizer(Folder.local(tmp_path)), load_tokenizer(Folder.local(tmp_path))
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.get_vocab(), ours.get_added_vocab()) == (theirs.get_vocab(), theirs.get_added_vocab())
    texts = ["a small <|eot_id|> thing of more than nine tokens", ""]
    assert ours(texts, add_special_tokens=False).input_ids == theirs(texts, add_special_tokens=False).input_ids
    assert ours(texts[0], add_special_tokens=False).input_ids == theirs(texts[0], add_special_tokens=False).input_ids
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


@pytest.mark.parametrize("layout", ["demo", "bundle", "llava"])
def test_a_model_is_described_without_torch_and_transformers(tmp_path: Path, layout: str) -> None:
    make = {"demo": lambda _: "demo", "bundle": save_tiny_bundle, "llava": save_llava}
    code = (
        "import sys; from captioner.model.bundle import describe; found = describe(sys.argv[1])\n"
        "print(*{'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)); print(found.fingerprint)"
    )
    name = str(make[layout](tmp_path))
    run = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [describe(name).fingerprint]


def test_a_tokenizer_of_demo_needs_no_transformers() -> None:
    assert isinstance(read_tokenizer(Folder.local(bundle_path() / "llama")), Tokenizer)
