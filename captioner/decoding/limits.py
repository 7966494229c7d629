"""What an engine refuses: at its start, and of a request. Each error names value, expectation and remedy."""

from collections.abc import Sequence

from torch import Tensor
from transformers import LlamaForCausalLM

from captioner.config import DecodingConfig
from captioner.decoding.layout import SlotLayout, group_size
from captioner.decoding.request import Request
from captioner.errors import ConfigError, ShapeError


def check_context(
    llama: LlamaForCausalLM,
    length: int | None,
    shared_len: int,
    prefix_len: int,
    suffix_len: int,
    decoding: DecodingConfig,
) -> None:
    """Raise ConfigError unless the model's context holds the longest caption of the longest prompt.

    length: of the context, by default as the model's config says."""
    context, prompt_len = length or llama.config.max_position_embeddings, shared_len + suffix_len
    needed = prompt_len + prefix_len + decoding.max_new_tokens
    if needed > context:
        raise ConfigError(
            f"--max-new-tokens is {decoding.max_new_tokens}, but {prompt_len} prompt tokens, {prefix_len} of the image "
            f"and the caption make {needed}, and the model's context holds {context}; expected at most "
            f"{context - prompt_len - prefix_len}"
        )


def check_slots(slots: int, layout: SlotLayout, decoding: DecodingConfig) -> None:
    """Raise ConfigError unless the slots hold the captions of one image, or if beams are to be constrained."""
    if layout.is_constrained and decoding.num_beams > 1:
        raise ConfigError(f"--num-beams is {decoding.num_beams}; expected 1, as a beam search is not constrained")
    if slots < layout.slots_per_image:
        raise ConfigError(
            f"--slots is {slots}; expected at least {layout.slots_per_image}, the beams or captions of one image"
        )


def check_request(request: Request, layout: SlotLayout, decodings: Sequence[DecodingConfig], *, width: int) -> None:
    """Raise ShapeError or ConfigError unless an engine of this layout takes the request. width: of the model."""
    _check_embeds(request, "prefix", request.prefix, 1, layout.max_prefix_len, width)
    if not 1 <= len(request.forks) <= layout.num_forks:
        raise ShapeError(
            f"request {request.id!r} has {len(request.forks)} forks; this engine was made for 1 to {layout.num_forks}"
        )
    used = [fork.decoding for fork in request.forks] + [fork.redraw.decoding for fork in request.forks if fork.redraw]
    if max(used) >= len(decodings):
        raise ShapeError(f"request {request.id!r} names a decoding beyond the {len(decodings)} of this engine")
    num_slots = sum(group_size(decodings[fork.decoding]) for fork in request.forks)
    if num_slots > layout.slots_per_image:
        raise ShapeError(
            f"request {request.id!r} takes {num_slots} slots; this engine has {layout.slots_per_image} an image"
        )
    if decodings[0].num_beams > 1 and any(fork.redraw for fork in request.forks):
        raise ConfigError(f"request {request.id!r} has a redraw; expected an engine without beams")
    for fork in request.forks:
        if fork.suffix is not None:
            _check_embeds(request, "suffix", fork.suffix, 0, layout.max_suffix_len, width)
        if fork.allowed_tokens is not None and not layout.is_constrained:
            raise ConfigError(
                f"request {request.id!r} has allowed_tokens; expected an engine made with is_constrained, without beams"
            )


def _check_embeds(request: Request, name: str, embeds: Tensor, least: int, most: int, width: int) -> None:
    if embeds.ndim != 2 or embeds.shape[1] != width or not least <= len(embeds) <= most:
        raise ShapeError(
            f"the {name} of request {request.id!r} is float{list(embeds.shape)}; this engine was made for "
            f"float[{least} to {most}, {width}]"
        )
