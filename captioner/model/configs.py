"""Values of a config.json, as transformers reads them: its defaults, its older names.

Knows how values are checked, not what they mean: a family's fields are in `towers` and `language`. Without torch and
transformers, so that a model is described in a fraction of a second; transformers reads the same file again when the
model is loaded. A test compares both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from captioner.errors import BundleError

__all__ = ["ACTIVATIONS", "PartConfig", "check_heads", "check_not_quantized", "invalid", "known_values"]

# fmt: off
ACTIVATIONS = frozenset({
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu",
    "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu",
})
# fmt: on
"""Names of activations: the keys of transformers' ACT2FN."""


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """What a config.json says of one part of a model. The fields of a family decide shapes and results."""

    model_type: ClassVar[str] = ""
    class_name: ClassVar[str] = ""
    """The class of transformers that reads the same file."""

    unchecked: ClassVar[tuple[str, ...]] = ("raw",)
    """Fields whose type is not that of their default."""

    optional: ClassVar[tuple[str, ...]] = ()
    """Fields for which null means that the file names none."""

    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The file's own values, for transformers."""

    def own_values(self) -> dict[str, Any]:
        """Return the values of all fields but `raw`."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "raw"}


def check_not_quantized(raw: Mapping[str, Any], *, where: str) -> None:
    """Raise BundleError for the config of a quantized checkpoint."""
    if "quantization_config" in raw:
        raise BundleError(
            f"{where} is a quantized checkpoint; expected the original weights in float32, float16 or bfloat16"
        )


def known_values(kind: type[PartConfig], raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a file that a config has fields for, each of the type of the field's default."""
    known = {one.name: raw[one.name] for one in fields(kind) if one.name in raw and one.name not in kind.unchecked}
    for one in fields(kind):
        if one.name in known and known[one.name] is None and one.name in kind.optional:
            del known[one.name]
        elif one.name in known and not _is_of(known[one.name], one.default):
            expected = f"{type(one.default).__name__}, as {one.default!r}"
            raise invalid(kind, where, f"{one.name} is {known[one.name]!r}; expected {expected}")
    if (activation := known.get("hidden_act", "gelu")) not in ACTIVATIONS:
        raise invalid(kind, where, f"hidden_act is {activation!r}; expected one of {', '.join(sorted(ACTIVATIONS))}")
    return known


def check_heads(config: Any, where: str) -> None:
    """Raise BundleError unless the width is a multiple of the number of attention heads."""
    width, heads = config.hidden_size, config.num_attention_heads
    if heads < 1 or width % heads:
        raise invalid(type(config), where, f"hidden_size {width} is not a multiple of num_attention_heads {heads}")


def invalid(kind: type[PartConfig], where: str, problem: str) -> BundleError:
    """Return the error of a config.json with a value that cannot be."""
    return BundleError(f"{where}/config.json is not a valid {kind.class_name}: {problem}")


def _is_of(value: object, default: object) -> bool:
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
