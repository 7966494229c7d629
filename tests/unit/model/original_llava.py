"""A LLaVA of transformers written in the original layout, as haotian-liu/LLaVA saves one."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from tests.unit.model.tiny_models import write_json

_PROJECTOR = {"linear_1": "0", "linear_2": "2"}


def save_original(converted: Path, folder: Path, *, tower: Path | None, **changes: Any) -> Path:
    """Write the checkpoint and its tokenizer. tower: write the vision tower there, instead of into the weights."""
    model = AutoModelForImageTextToText.from_pretrained(converted)
    config, vision = model.config, model.model.vision_tower
    folder.mkdir(parents=True, exist_ok=True)
    named = tower or folder.parent / "tower-config"
    if tower:
        vision.save_pretrained(tower)
    else:
        vision.config.save_pretrained(named)
    shutil.copy(converted / "preprocessor_config.json", named)
    inside = {f"model.vision_tower.vision_tower.vision_model.{n}": t for n, t in vision.state_dict().items()}
    language = {f"model.{n}": t for n, t in model.model.language_model.state_dict().items()}
    projector = {
        f"model.mm_projector.{_PROJECTOR[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor
        for name, tensor in model.model.multi_modal_projector.state_dict().items()
    }
    tensors = {**language, "lm_head.weight": model.lm_head.weight.detach(), **projector, **({} if tower else inside)}
    if hasattr(model.model, "image_newline"):
        tensors["model.image_newline"] = model.model.image_newline.detach()
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")
    kind = config.text_config.model_type
    settings = {
        **config.text_config.to_dict(),
        "model_type": {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}[kind],
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(named),
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "square",
        "eos_token_id": 257,
    }
    write_json(folder / "config.json", settings | changes)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(converted / file, folder)
    return folder
