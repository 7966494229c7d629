"""CLIP, LLaMA and LLaVA of transformers' own classes at toy size, saved as people save them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

IMAGE_SIZE = 32
CLIP_WIDTH = 48
LLAMA_WIDTH = 64

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def llama3_tokenizer(
    *,
    num_words: int = 256,
    num_special: int = 16,
    eos: str = "<|end_of_text|>",
    extra: tuple[str, ...] = (),
    spelled: Callable[[int], str] = "Ġw{}".format,
):
    """LLaMA-3's layout: byte-level BPE ids 0 to num_words - 1, then its special tokens, reserved ones between.

    spelled: the n-th word behind the bytes."""
    words = _BYTES + [spelled(i) for i in range(num_words - len(_BYTES))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = iter(range(num_special))
    special = [_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(num_special)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (*special, *extra)])
    start = special[0]
    template = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, tokenizer.token_to_id(start))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=eos, clean_up_tokenization_spaces=True
    )


def clip_config(**changes: Any) -> CLIPConfig:
    vision = {
        "hidden_size": CLIP_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": 16,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "bos_token_id": 98,
        "eos_token_id": 99,
        "projection_dim": 16,
    }
    return CLIPConfig(text_config=text, vision_config=vision | changes, projection_dim=16)


def preprocessor_config(size: int = IMAGE_SIZE) -> dict[str, Any]:
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def save_clip(folder: Path, config: CLIPConfig | None = None, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = config or clip_config()
    CLIPModel(config).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", preprocessor_config(config.vision_config.image_size))
    return folder


def llama_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "hidden_size": LLAMA_WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 272,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "rope_theta": 500000.0,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**settings | changes)


def save_llama(folder: Path, config: LlamaConfig | None = None, seed: int = 1, tokenizer=None, **save: Any) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(config or llama_config()).save_pretrained(folder, **save)
    (tokenizer or llama3_tokenizer()).save_pretrained(folder)
    return folder


def siglip_config(**changes: Any) -> SiglipVisionConfig:
    settings: dict[str, Any] = {
        "hidden_size": CLIP_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    }
    return SiglipVisionConfig(**settings | changes)


def siglip_preprocessor(size: int = IMAGE_SIZE) -> dict[str, Any]:
    return {
        "do_center_crop": False,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }


def save_siglip(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A whole SigLIP with its text tower, as published."""
    torch.manual_seed(seed)
    text = {"hidden_size": CLIP_WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = siglip_config(**changes).to_dict()
    SiglipModel(SiglipConfig(text_config=text | {"vocab_size": 100}, vision_config=vision)).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", siglip_preprocessor())
    return folder


def save_language(folder: Path, kind: str, seed: int = 1) -> Path:
    """A language model of a family alone, with LLaMA-3's tokenizer."""
    torch.manual_seed(seed)
    classes = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
    classes[kind](language_config(kind)).save_pretrained(folder)
    llama3_tokenizer().save_pretrained(folder)
    return folder


def language_config(kind: str, **changes: Any) -> PretrainedConfig:
    """A tiny config of a family of language models, of the sizes of `llama_config`."""
    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    settings = llama_config(vocab_size=320, pad_token_id=273).to_dict()
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "head_dim", "pretraining_tp"):
        settings.pop(name, None)
    return classes[kind](**settings | changes)


def save_llava(
    folder: Path,
    *,
    tokenizer=None,
    seed: int = 2,
    text: dict[str, Any] | None = None,
    vision: PretrainedConfig | None = None,
    language: PretrainedConfig | None = None,
    **changes: Any,
) -> Path:
    """A LLaVA over LLaMA-3 as published: `<image>` and `<pad>` behind the special tokens, a padded vocabulary.

    vision, language: configs of another tower and language model."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision or clip_config().vision_config,
        text_config=language or llama_config(vocab_size=320, pad_token_id=273, **(text or {})),
        image_token_index=272,
        image_seq_length=16,
        **changes,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=257)
    model.save_pretrained(folder)
    (tokenizer or llama3_tokenizer(extra=("<image>", "<pad>"))).save_pretrained(folder)
    is_siglip = vision is not None and vision.model_type == "siglip_vision_model"
    write_json(folder / "preprocessor_config.json", siglip_preprocessor() if is_siglip else preprocessor_config())
    return folder
