"""What is known of a family of vision towers, and a tower of one: found in a folder, not loaded yet.

Knows no family. Letters in shapes: B images, S image side, N states, F the tower's width.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captioner.errors import BundleError, ShapeError
from captioner.images.preprocessing import Preprocessing
from captioner.model.configs import PartConfig, check_heads, invalid, known_values
from captioner.model.folder import Folder
from captioner.model.shapes import Shapes, linear_shapes
from captioner.model.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from torch import Tensor, nn

__all__ = ["SHAPING", "TowerConfig", "TowerFamily", "TowerSource", "layer_shapes", "num_layers_to"]

SHAPING = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
"""Values of a config that decide the results of a tower of patches."""

_PIXELS = (
    "crop_size",
    "do_center_crop",
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)


@dataclass(frozen=True, kw_only=True)
class TowerConfig(PartConfig):
    """A transformer over square patches of a square image. The defaults are a family's own."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    @classmethod
    def read(cls, raw: "Mapping[str, Any]", *, where: str) -> "Self":
        """Return the config of a vision tower. Raises BundleError for a value that cannot be."""
        for name in ("image_size", "patch_size"):
            if not isinstance(side := raw.get(name, 0), int):
                raise BundleError(
                    f"a vision config has image or patch size {side}; expected one number, the side of a square"
                )
        config = cls(**known_values(cls, raw, where), raw=raw)
        if config.patch_size < 1:
            raise invalid(cls, where, f"patch_size is {config.patch_size}; expected at least 1")
        check_heads(config, where)
        return config

    @classmethod
    def read_whole(cls, raw: "Mapping[str, Any]", *, where: str) -> "Self":
        """Return the config of the vision tower of a checkpoint that has a text tower, too."""
        return cls.read(dict(raw.get("vision_config") or {}), where=where)

    def for_transformers(self) -> dict[str, Any]:
        """Return what the class of transformers is made of."""
        return {**self.raw, **self.own_values()}

    def for_patches(self) -> "Self":
        """Return the config of a tower whose patch states alone are read: other parts may be missing."""
        return self

    @property
    def num_patches(self) -> int:
        """Patch states of one image, without CLS."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class TowerFamily:
    """A family of vision towers: how its config and weights are read, what it sees, and how it is run."""

    name: str
    """In messages and plans."""

    config: type[TowerConfig]
    """Reads its config.json; `config.model_type` is the key of the family."""

    whole_type: str | None = None
    """The model_type of a checkpoint that holds a text tower beside it."""

    shaping: tuple[str, ...] = ("model_type", *SHAPING)
    """Values of the config that decide results."""

    has_cls: bool
    """Whether its first state is that of a CLS token rather than of a patch."""

    shapes: Callable[[Any], Shapes]
    """The tensors of a config."""

    unused: Callable[[Any], frozenset[str]] = lambda _: frozenset()
    """Tensors of a config that may be missing."""

    tensor_name: Callable[[str], str | None]
    """A tensor's name in the tower from its name in a checkpoint of the family, None for another part's."""

    preprocessing: Callable[[Any], dict[str, Any]]
    """The image processor's config of a folder that has none."""

    has_pooled: Callable[[Any], bool] = lambda _: True
    """Whether a tower of a config has the pooled state."""

    build: "Callable[[TowerSource, int | None], nn.Module]"
    """The module with weights not set yet; with a number, only so many layers, for `states` alone."""

    optimised: "Callable[[nn.Module], nn.Module]" = lambda tower: tower
    """The loaded module with faster parts in place of its own."""

    states: "Callable[[Any, Tensor], Tensor]"
    """The output of the last layer, float[B, N, F], of pixel_values, float[B, 3, S, S]."""

    pooled: "Callable[[Any, Tensor], Tensor]" = lambda tower, pixel_values: (
        tower(pixel_values=pixel_values).pooler_output
    )
    """One state for the whole image, float[B, F], of pixel_values: of CLIP the normalised CLS state."""


@dataclass(frozen=True)
class TowerSource:
    """A vision tower that was found and checked, not loaded yet."""

    family: TowerFamily
    folder: Folder
    config: TowerConfig
    weights: Weights
    preprocessing: dict[str, Any]
    """The image processor's config, as its file has it."""

    text_weights: Weights | None
    """Of the text tower and both projections; None if the folder has no text tower, or no tokenizer for it."""

    @property
    def image_size(self) -> int:
        """Side of the square image that the tower reads, in pixels."""
        return self.config.image_size

    @property
    def num_states(self) -> int:
        """States of one image, that of CLS included."""
        return self.config.num_patches + self.family.has_cls

    def num_layers(self, hidden_state: int) -> int:
        """Return the number of layers up to a hidden state, numbered as in transformers: -1 is the last."""
        return num_layers_to(hidden_state, self.config, f"{self.family.name} in {self.folder.name}")

    def shape(self) -> dict[str, Any]:
        """Return the config values that affect the results of the tower."""
        return {name: getattr(self.config, name) for name in self.family.shaping}

    def fingerprint(self) -> str:
        """Return a hex digest of the tower's weights and config; a text tower does not change it."""
        identity = [self.weights.fingerprint(), self.shape()]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def pixel_identity(self) -> dict[str, Any]:
        """Return the preprocessing values that affect the pixels that the tower reads."""
        pixels = {name: self.preprocessing[name] for name in _PIXELS if name in self.preprocessing}
        return pixels | ({"do_pad": True} if self.preprocessing.get("do_pad") else {})  # false is as if left out

    def checked(self) -> "TowerSource":
        """Return the source unchanged if its weights and preprocessing fit its config; raise BundleError otherwise."""
        shapes, unused = self.family.shapes(self.config), self.family.unused(self.config)
        module = self.config.class_name.replace("Config", "Model")
        self.weights.check_fits(shapes, module, optional=unused)
        size = Preprocessing.from_config(self.preprocessing).size
        if size != self.image_size:
            raise ShapeError(
                f"the preprocessing in {self.folder.name} makes images of {size}x{size} pixels, its {self.family.name} "
                f"reads {self.image_size}x{self.image_size}; expected the same size in both"
            )
        return self


def num_layers_to(hidden_state: int, config: TowerConfig, tower: str) -> int:
    """Return the number of layers up to a hidden state of a config, numbered as in transformers: -1 is the last."""
    last = config.num_hidden_layers
    layers = hidden_state if hidden_state >= 0 else last + 1 + hidden_state
    if not 0 <= layers <= last:
        raise BundleError(
            f"vision_feature_layer is {hidden_state}, but the {tower} has {last} layers; expected {-last - 1} to {last}"
        )
    return layers


def layer_shapes(config: TowerConfig, norms: tuple[str, ...]) -> Shapes:
    """Return the tensors of the layers `encoder.layers.N` that CLIP and SigLIP share, and of these norms."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {}
    for layer in (f"encoder.layers.{number}" for number in range(config.num_hidden_layers)):
        norms += (f"{layer}.layer_norm1", f"{layer}.layer_norm2")
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear_shapes(f"{layer}.self_attn.{name}", width, width)
        shapes |= linear_shapes(f"{layer}.mlp.fc1", width, inner) | linear_shapes(f"{layer}.mlp.fc2", inner, width)
    return shapes | {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
