"""The widths of the real models, with random weights: CLIP ViT-L/14 and LLaMA-3-8B, few layers."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from captioner.config import DecodingConfig
from captioner.model.bundle import describe, load, save_bundle
from captioner.model.module import allocate
from captioner.model.projector import ProjectorConfig, build_projector
from tests.unit.model.tiny_models import llama3_tokenizer, preprocessor_config, write_json

CLIP_VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 768,
}
CLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}


@torch.no_grad()
def random_model(model_class: type[PreTrainedModel], config: CLIPConfig | LlamaConfig) -> PreTrainedModel:
    model = allocate(model_class, config, dtype=torch.bfloat16, device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def save_real_geometry(folder: Path) -> None:
    clip = CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VIT_L_14, projection_dim=768)
    random_model(CLIPModel, clip).save_pretrained(folder / "clip")
    write_json(folder / "clip/preprocessor_config.json", preprocessor_config(224))
    llama = random_model(LlamaForCausalLM, LlamaConfig(**LLAMA_3_8B))
    llama.generation_config = GenerationConfig(bos_token_id=128_000, eos_token_id=[128_001, 128_009])
    llama.save_pretrained(folder / "llama", max_shard_size="1GB")
    llama3_tokenizer(num_words=128_000, num_special=256, eos="<|eot_id|>").save_pretrained(folder / "llama")
    config = ProjectorConfig(kind="linear", num_features=1024, width=4096)
    save_bundle(folder, build_projector(config), config, clip="clip", llama="llama")


@pytest.mark.slow
def test_a_bundle_of_real_widths_captions_an_image_in_bfloat16():
    with TemporaryDirectory() as path:  # 3 GB, which pytest's own folders would keep
        save_real_geometry(Path(path))
        assert len(list(Path(path, "llama").glob("model-*.safetensors"))) >= 3
        told = describe(path)
        assert (told.vocab_size, told.context_length, told.eos_token_ids) == (128_256, 8192, (128_001, 128_009))
        assert told.llama_parameters == 2 * 128_256 * 4096 + 218_116_096
        model = load(path, device="cpu", dtype="bfloat16")
        pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
        assert model.features(pixels).shape == (1, 1024)
        caption = model.generate(model.encode(pixels), DecodingConfig(max_new_tokens=4))[0]
        assert 1 <= len(caption.token_ids) <= 4
        assert model.tokenizer.convert_ids_to_tokens(128_009) == "<|eot_id|>"
