"""What a model takes of a GPU's memory is computed from its config, and which cards hold it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from captioner.captioning.capacity import model_capacity
from captioner.captioning.card_rate import ImageWork, images_per_s
from captioner.captioning.estimate import estimate_job
from captioner.command_line import parse
from captioner.config import PlanConfig
from captioner.errors import ConfigError
from captioner.model.language.llama import LlamaConfig, llama_shapes
from captioner.model.towers.clip import ClipConfig, clip_shapes
from tests.unit.model.tiny_models import llama3_tokenizer, preprocessor_config, save_llava, write_json

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128320,
    "max_position_embeddings": 8192,
    "eos_token_id": 257,
}
CLIP_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "image_size": 336,
}


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file whose header is right and whose values take no disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def llava_8b(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sizes of xtuner/llava-llama-3-8b-v1_1-transformers."""
    folder = tmp_path_factory.mktemp("llava-8b")
    config = {"model_type": "llava", "vision_config": CLIP_336, "text_config": LLAMA_3_8B, "image_token_index": 272}
    write_json(folder / "config.json", config)
    projector = {"linear_1.weight": (4096, 1024), "linear_1.bias": (4096,)}
    projector |= {"linear_2.weight": (4096, 4096), "linear_2.bias": (4096,)}
    language = llama_shapes(LlamaConfig.read(LLAMA_3_8B, where=""))
    tensors = {f"vision_tower.{n}": s for n, s in clip_shapes(ClipConfig.read(CLIP_336, where="")).items()}
    tensors |= {f"language_model.{n}": s for n, s in language.items()}
    tensors |= {f"multi_modal_projector.{n}": s for n, s in projector.items()}
    write_sparse(folder / "model.safetensors", tensors)
    llama3_tokenizer(extra=("<image>",)).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", preprocessor_config(336))
    return str(folder)


def test_a_model_of_8b_is_held_by_cards_with_more_slots_the_larger_they_are(
    llava_8b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = estimate_job(parse(PlanConfig, ["--model", llava_8b]))
    assert summary["image_tokens"] == 576
    assert summary["weights_bytes"] == pytest.approx(16.7e9, rel=0.01)
    assert summary["kv_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert summary["kv_bytes_per_slot"] >= (576 + 64) * summary["kv_bytes_per_token"]
    slots = summary["slots"]
    assert 8 <= slots["24"] < slots["48"] <= slots["80"]
    lines = capsys.readouterr().err
    assert "<image> x 576" in lines
    assert "(computed, not measured)" in lines


@pytest.mark.parametrize(
    ("flags", "group"),
    [([], 1), (["--num-beams", "4"], 4), (["--do-sample", "true", "--num-captions", "3"], 3)],
    ids=["greedy", "beams", "candidates"],
)
def test_the_slots_of_one_image_share_its_columns(llava_8b: str, flags: list[str], group: int) -> None:
    flags = ["--model", llava_8b, "--max-new-tokens", "64", *flags]
    summary = model_capacity(parse(PlanConfig, flags))
    prompt = summary["prompt_tokens"] + summary["image_tokens"]
    columns = summary["kv_bytes_per_slot"] / summary["kv_bytes_per_token"]
    assert columns == -(-prompt // 16) * 16 // group + 64
    assert all(number % group == 0 for number in summary["slots"].values())


def test_longer_captions_and_wider_numbers_leave_fewer_slots(llava_8b: str) -> None:
    short = model_capacity(parse(PlanConfig, ["--model", llava_8b]))["slots"]
    long = model_capacity(parse(PlanConfig, ["--model", llava_8b, "--max-new-tokens", "2048"]))["slots"]
    wide = model_capacity(parse(PlanConfig, ["--model", llava_8b, "--dtype", "float32"]))["slots"]
    assert long["24"] < short["24"]
    assert wide["24"] == 0, "33 GB of weights"


def test_the_rate_and_price_of_one_card_are_computed(llava_8b: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", llava_8b, "--max-new-tokens", "64", "--gpu-hourly", "2.5"]
    summary = model_capacity(parse(PlanConfig, flags))
    half_flops, half_bytes_per_s, language = 989e12 / 2, 3.35e12 / 2, 16.7e9 / 2 - 0.3e9 - 128_320 * 4096
    prompt = summary["prompt_tokens"] + summary["image_tokens"]  # of which the first few are shared
    prefill_s = 2 * (language * prompt + 0.3e9 * 577) / half_flops
    kv_bytes = (prompt + 32) * summary["kv_bytes_per_token"]
    step_s = 2 * language / summary["slots"]["80"] + kv_bytes
    seconds = prefill_s + 64 * step_s / half_bytes_per_s
    assert summary["images_per_s"] == pytest.approx(1 / seconds, rel=0.05)
    assert summary["price_per_million"] == pytest.approx(2.5e6 / summary["images_per_s"] / 3600, rel=0.01)
    assert "a million (computed at half of its peak, not measured)" in capsys.readouterr().err
    long = model_capacity(parse(PlanConfig, ["--model", llava_8b, "--max-new-tokens", "512"]))
    assert long["images_per_s"] < summary["images_per_s"]
    assert long["price_per_million"] is None


def test_a_card_that_holds_no_slot_has_no_rate() -> None:
    work = ImageWork(
        tower_parameters=1, tower_tokens=1, language_parameters=1, prompt_tokens=1, caption_tokens=1, kv_bytes=1
    )
    assert images_per_s(work, 0, 2) == 0
    assert images_per_s(work, 2, 2) > images_per_s(work, 1, 2)


def test_a_model_is_refused_as_a_job_would_refuse_it(llava_8b: str) -> None:
    with pytest.raises(ConfigError, match="--max-new-tokens is 9000"):
        estimate_job(parse(PlanConfig, ["--model", llava_8b, "--max-new-tokens", "9000"]))


def test_the_memory_of_weights_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    folder = save_llava(tmp_path)
    summary = model_capacity(parse(PlanConfig, ["--model", str(folder), "--dtype", "float32"]))
    stored = (folder / "model.safetensors").stat().st_size
    assert summary["weights_bytes"] == pytest.approx(stored, rel=0.05)
