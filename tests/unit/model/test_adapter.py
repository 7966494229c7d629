"""A bundle with an adapter is the model that peft makes of the same weights, and is told from every other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from captioner.decoding.cuda.fused_llama import FusedLlama
from captioner.decoding.cuda.unfused_llama import UnfusedLlama
from captioner.decoding.engine import _layers_for
from captioner.errors import BundleError, ConfigError, ShapeError
from captioner.model.adapter import adaptable, adapter_config
from captioner.model.bundle import describe, load, save_as_llava
from captioner.model.language.llama import LlamaConfig, llama_shapes
from tests.unit.model.test_llava_export import TEMPLATE
from tests.unit.model.test_model_oracle import pixels
from tests.unit.model.test_published_captioners import engine_tokens, expected_tokens
from tests.unit.model.tiny_models import edit_json, llama_config
from tests.unit.training import fitting_models as toys

SHAPES = llama_shapes(LlamaConfig.read(llama_config().to_dict(), where="here"))
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    toys.save_model(tmp_path / "bundle", lora=toys.LORA)
    return tmp_path / "bundle"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_peft_loads_its_folder_as_it_is_and_merges_it_to_our_weights(bundle: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(bundle / "llama")
    plain = {name: weight.clone() for name, weight in base.state_dict().items()}
    theirs = PeftModel.from_pretrained(base, bundle / "adapter").merge_and_unload().state_dict()
    ours = load(str(bundle), device="cpu").llama.state_dict()
    assert theirs.keys() == ours.keys()
    changed = {name for name, weight in ours.items() if not torch.equal(weight, plain[name])}
    assert {name.split(".")[-2] for name in changed} == set(toys.LORA.modules)
    assert len(changed) == 2 * 2
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)


def test_a_merged_adapter_and_one_in_layers_of_its_own_write_the_same_captions(bundle: Path) -> None:
    merged, apart = (load(str(bundle), device="cpu", merges_adapter=merges) for merges in (True, False))
    assert engine_tokens(merged, pixels(3)) == engine_tokens(apart, pixels(3))
    edit_json(bundle / "adapter" / "adapter_config.json", lora_alpha=400.0)
    assert engine_tokens(load(str(bundle), device="cpu"), pixels(3)) != engine_tokens(merged, pixels(3))


def test_layers_are_joined_only_where_their_weights_are_all_that_they_do(bundle: Path) -> None:
    merged, apart = (load(str(bundle), device="cpu", merges_adapter=merges) for merges in (True, False))
    assert isinstance(_layers_for(apart.llama, is_recorded=True), UnfusedLlama)
    plain = engine_tokens(merged, pixels(3))
    layers = _layers_for(merged.llama, is_recorded=True)
    assert isinstance(layers, FusedLlama)
    assert engine_tokens(merged, pixels(3), layers=layers) == plain
    assert engine_tokens(apart, pixels(3), layers=_layers_for(apart.llama, is_recorded=True)) == plain


def test_the_adapter_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    alone = describe(toys.save_model(tmp_path / "alone"))
    told = describe(toys.save_model(tmp_path / "bundle", lora=toys.LORA))
    louder = describe(toys.save_model(tmp_path / "louder", lora=replace(toys.LORA, alpha=5.0)))
    assert len({one.fingerprint for one in (alone, told, louder)}) == 3
    assert (alone.adapter, told.adapter) == (None, toys.LORA)
    assert told.llama_fingerprint == alone.llama_fingerprint
    assert told.adapter_parameters == 2 * (3 * (64 + 64) + 3 * (96 + 64))
    assert "adapter=rank3:q_proj,down_proj" in told.summary
    assert load(str(tmp_path / "bundle"), device="cpu").fingerprint == told.fingerprint
    versions = [json.loads((tmp_path / name / "bundle.json").read_text())["version"] for name in ("alone", "bundle")]
    assert versions == [1, 2], "older releases would leave the adapter out in silence"


def test_bfloat16_weights_are_rounded_once_after_the_sum(bundle: Path) -> None:
    exact, coarse = (load(str(bundle), device="cpu", dtype=dtype).llama for dtype in ("float32", "bfloat16"))
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        coarse.state_dict()[name].float(),
        exact.state_dict()[name],
        rtol=0.02,
        atol=0.02 * float(exact.state_dict()[name].abs().max()),
    )


def test_saved_as_llava_it_is_merged_and_writes_the_tokens_of_the_bundle(tmp_path: Path) -> None:
    toys.save_model(tmp_path, kind="mlp", image_tokens=16, template=TEMPLATE, lora=toys.LORA)
    save_as_llava(str(tmp_path), str(tmp_path / "llava"))
    model = load(str(tmp_path), device="cpu")
    tokens = engine_tokens(model, pixels(3))
    written = expected_tokens(tmp_path / "llava", model, pixels(3))
    assert tokens == [[token for token in row if token not in model.eos_token_ids] for row in written]
    own = load(str(tmp_path / "llava"), device="cpu", prompt=TEMPLATE).llama.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(own[name], model.llama.state_dict()[name])


STRANGE = {
    "DoRA": ({"use_dora": True}, "is a LORA adapter with use_dora; expected plain LoRA"),
    "another kind": ({"peft_type": "IA3"}, "is a IA3 adapter; expected plain LoRA"),
    "more than LoRA": ({"modules_to_save": ["lm_head"]}, "with modules_to_save"),
    "no rank": ({"r": 0}, r"has r = 0, lora_alpha = 4.0"),
    "names as a pattern": ({"target_modules": ".*proj"}, r"target_modules = '\.\*proj'"),
}


@pytest.mark.parametrize("change", STRANGE)
def test_an_adapter_that_would_be_merged_wrongly_is_refused(bundle: Path, change: str) -> None:
    changes, message = STRANGE[change]
    edit_json(bundle / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(BundleError, match=message):
        describe(str(bundle))


def test_an_adapter_of_other_maps_or_widths_is_refused(bundle: Path) -> None:
    edit_json(bundle / "adapter" / "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(
        BundleError, match=r"do not fit an adapter of the LLaMA in .*: no place for model\.layers\.0\.mlp"
    ):
        describe(str(bundle))
    edit_json(bundle / "adapter" / "adapter_config.json", target_modules=["q_proj", "down_proj"], r=4)
    with pytest.raises(ShapeError, match=r"down_proj\.lora_A\.weight is \[3, 96\], its config says \[4, 96\]"):
        describe(str(bundle))


def test_an_adapter_is_a_folder_inside(bundle: Path) -> None:
    edit_json(bundle / "bundle.json", adapter="/etc/adapter")
    with pytest.raises(BundleError, match="has adapter = '/etc/adapter'; expected 'adapter', a folder inside"):
        describe(str(bundle))


def test_all_linear_maps_are_adapted_unless_some_are_named() -> None:
    assert adaptable(SHAPES) == EVERY
    assert adapter_config(4, (), None, SHAPES).modules == EVERY
    assert adapter_config(4, (), None, SHAPES).scale == 2.0
    assert adapter_config(4, ("v_proj",), 2.0, SHAPES).names(SHAPES) == [
        f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)
    ]


def test_wrong_maps_and_ranks_are_refused_naming_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--lora-modules names query, lm_head; .* are q_proj, k_proj, .*, down_proj"):
        adapter_config(4, ("query", "q_proj", "lm_head"), None, SHAPES)
    with pytest.raises(ConfigError, match=r"--lora-rank is 33; the narrowest of .* is 32 wide: expected at most 32"):
        adapter_config(33, (), None, SHAPES)
