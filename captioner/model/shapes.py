"""Names and shapes of the tensors of a module, as transformers' modules have them.

Written out by hand in `towers`, `language` and `projector_config`, so that weights are checked against a config without
torch; tests compare them with the modules.
"""

__all__ = ["Shapes", "linear_shapes"]

Shapes = dict[str, tuple[int, ...]]
"""Name -> shape of each tensor of a module."""


def linear_shapes(name: str, reads: int, gives: int, *, has_bias: bool = True) -> Shapes:
    """Return the tensors of a linear map; name: empty for one that is the whole module."""
    dot = f"{name}." if name else ""
    return {f"{dot}weight": (gives, reads)} | ({f"{dot}bias": (gives,)} if has_bias else {})
