"""A LoRA adapter of a language model: a folder as peft writes one, found and checked before a weight is loaded.

    adapter_config.json           rank, alpha and the linear maps that it adapts, by the names that all layers share
    adapter_model.safetensors     two narrow matrices for each of these

`peft` and what reads its folders load it as it is. Captioning needs no peft: a bundle's adapter is merged into the
language model when it is loaded. Knows no family and, but for `merge_into`, no tensor.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captioner.errors import BundleError, ConfigError
from captioner.model.folder import Folder
from captioner.model.shapes import Shapes
from captioner.model.weights import Weights, read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Adapter", "AdapterConfig", "adaptable", "adapter_config", "read_adapter", "save_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LAYERS = ".layers."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PLAIN = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
"""Settings of peft under which an update is the product of two matrices, scaled by alpha over rank."""

_MORE = ("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "lora_bias")
"""Settings of peft that would change which weights there are, or how one is scaled; none may be set."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which linear maps of a language model are adapted, and how."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Names of linear maps, as `q_proj`: those of every layer."""

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return self.alpha / self.rank

    def names(self, base: Shapes) -> list[str]:
        """Return the linear maps of a language model that are adapted, as `model.layers.0.self_attn.q_proj`."""
        return [name for name in _linear_maps(base) if name.rpartition(".")[2] in self.modules]

    def shapes(self, base: Shapes) -> Shapes:
        """Return the tensors of an adapter of a language model of these."""
        found: Shapes = {}
        for name in self.names(base):
            gives, reads = base[f"{name}.weight"]
            found |= {f"{name}{_DOWN}": (self.rank, reads), f"{name}{_UP}": (gives, self.rank)}
        return found


@dataclass(frozen=True)
class Adapter:
    """An adapter that was found, not loaded yet; its tensors have the names of the maps that they adapt."""

    config: AdapterConfig
    weights: Weights

    def fingerprint(self) -> list[Any]:
        """Return what identifies it: settings, and a digest of the weights."""
        return [self.config.alpha, self.weights.fingerprint()]

    def check(self, base: Shapes, language: str) -> None:
        """Raise BundleError or ShapeError unless it is one of a language model of these tensors."""
        self.weights.check_fits(self.config.shapes(base), f"an adapter of {language}")

    def tensors(self) -> "dict[str, Tensor]":
        """Return its matrices on the CPU, as they are stored."""
        return {name: self.weights.tensor(name) for name in self.weights.tensors}

    def merge_into(self, module: "nn.Module", rename: Callable[[str], str] = str) -> None:
        """Add the updates to the weights of a loaded language model, as peft merges them, in float32.

        rename: from the name of a weight to its name in the module."""
        import torch

        targets = dict(module.named_parameters())
        for name in (stored.removesuffix(_DOWN) for stored in self.weights.tensors if stored.endswith(_DOWN)):
            weight = targets[rename(f"{name}.weight")]
            down, up = (
                self.weights.tensor(f"{name}{matrix}").to(weight.device, torch.float32) for matrix in (_DOWN, _UP)
            )
            with torch.no_grad():
                weight.copy_(weight.float() + (up @ down) * self.config.scale)


def adaptable(base: Shapes) -> tuple[str, ...]:
    """Return the names of the linear maps that every layer of a language model has, in its order."""
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in _linear_maps(base)))


def adapter_config(rank: int, modules: tuple[str, ...], alpha: float | None, base: Shapes) -> AdapterConfig:
    """Return the settings of a new adapter of a language model of these tensors. modules: all, if empty.

    Raises ConfigError for a map that no layer has, and for a rank that is no lower than the maps' own."""
    there = adaptable(base)
    if unknown := [name for name in modules if name not in there]:
        raise ConfigError(
            f"--lora-modules names {', '.join(unknown)}; the linear maps of each layer of this language model are"
            f" {', '.join(there)}: expected some of these"
        )
    config = AdapterConfig(rank=rank, alpha=2.0 * rank if alpha is None else alpha, modules=modules or there)
    narrowest = min(min(base[f"{name}.weight"]) for name in config.names(base))
    if rank > narrowest:
        raise ConfigError(
            f"--lora-rank is {rank}; the narrowest of the maps {', '.join(config.modules)} is {narrowest} wide:"
            f" expected at most {narrowest}"
        )
    return config


def read_adapter(folder: Folder) -> Adapter:
    """Return the adapter in a folder. Raises BundleError for one of another kind than plain LoRA."""
    raw = folder.read_json(_CONFIG)
    weights = read_weights(folder, _WEIGHTS)
    return Adapter(_read_config(raw, f"{folder.name}/{_CONFIG}"), weights.select(_own_name))


def save_adapter(folder: Folder, config: AdapterConfig, tensors: "Mapping[str, Tensor]") -> None:
    """Write an adapter as peft does. tensors: by the names of `AdapterConfig.shapes`."""
    from safetensors.torch import save as to_safetensors

    folder.fs.makedirs(folder.path, exist_ok=True)
    state = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    folder.write(_WEIGHTS, to_safetensors(state, {"format": "pt"}))
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.modules),
        **_PLAIN,
    }
    folder.write(_CONFIG, json.dumps(content, indent=2).encode() + b"\n")


def _linear_maps(base: Shapes) -> list[str]:
    """Return the linear maps inside the layers, not those from and to tokens."""
    return [
        name.removesuffix(".weight")
        for name, shape in base.items()
        if _LAYERS in f".{name}" and name.endswith(".weight") and len(shape) == 2
    ]


def _own_name(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _read_config(raw: Mapping[str, Any], where: str) -> AdapterConfig:
    strange = [name for name, value in _PLAIN.items() if raw.get(name, value) != value]
    strange += [name for name in _MORE if raw.get(name)]
    if raw.get("peft_type") != "LORA" or strange:
        raise BundleError(
            f"{where} is a {raw.get('peft_type')} adapter"
            + (f" with {', '.join(strange)}" if strange else "")
            + "; expected plain LoRA, as a fit writes it"
        )
    rank, alpha, modules = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    is_list = isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not is_list:
        raise BundleError(
            f"{where} has r = {rank!r}, lora_alpha = {alpha!r}, target_modules = {modules!r}; expected a rank of 1 or"
            " more, a number and a list of names"
        )
    return AdapterConfig(rank=rank, alpha=float(alpha), modules=tuple(modules or ()))
