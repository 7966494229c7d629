"""What a fit costs by rung, computed from sizes alone: nothing is measured.

Each token of an example is multiplied with the language model's weights forward and, to reach the projector, backward;
frozen weights need no gradient, those of an adapter do. A caption's tokens are multiplied with the table of logits,
too. The tower runs forward: on patches for each example, for the pooled state once an image. Of the card's peak a third
counts, which LLaVA-1.5's first stage reached: 558,000 images in 28 hours of an A100.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from captioner.model.card import CARD, CARD_FLOPS
from captioner.model.projector_config import KINDS, ProjectorConfig
from captioner.training.fit.fit_plan import FitPlan

__all__ = ["FitWork", "fit_prices", "price_lines"]

_SHARE = 1 / 3
_SAMPLED_CAPTIONS = 1000


@dataclass(frozen=True, kw_only=True)
class FitWork:
    """What all rungs of a fit share."""

    tower_parameters: int
    num_patches: int
    language_parameters: int
    """Without the tables of embeddings and logits."""

    logit_parameters: int
    prompt_tokens: int
    caption_tokens: float
    """Of a caption with its end token, on average."""

    num_images: int
    num_examples: int
    """That all steps show together."""

    adapter_parameters: int = 0
    recomputes: bool = False
    """Whether activations are computed again in the backward pass."""

    @property
    def image_flops(self) -> float:
        """Operations of the tower for one image."""
        return 2.0 * self.tower_parameters * (self.num_patches + 1)

    def example_flops(self, projector: ProjectorConfig) -> float:
        """Return the operations of one example in a step."""
        tokens = self.prompt_tokens + projector.num_image_tokens + self.caption_tokens
        passes = 3 if self.recomputes else 2
        language = 2 * passes * (self.language_parameters * tokens + self.logit_parameters * self.caption_tokens)
        language += 6 * self.adapter_parameters * tokens
        weights = sum(math.prod(shape) for shape in projector.shapes.values())
        if not projector.reads_patches:
            return language + 6 * weights
        rows = self.num_patches if KINDS[projector.kind].pooling == "query" else projector.num_image_tokens
        return language + 6 * weights * rows + self.image_flops

    def flops(self, projector: ProjectorConfig) -> float:
        """Return the operations of the whole fit."""
        once = 0.0 if projector.reads_patches else self.num_images * self.image_flops
        return once + self.num_examples * self.example_flops(projector)


def fit_prices(plan: FitPlan) -> dict[str, dict[str, float]]:
    """Return the operations of an example and the hours of one card, for this fit and the rungs beside it."""
    work, own = _work_of(plan), plan.start.projector
    a_second = CARD_FLOPS[4 if plan.config.model.dtype == "float32" else 2] * _SHARE
    return {
        name: {
            "flop_per_example": _rounded(work.example_flops(projector)),
            "gpu_hours": _rounded(work.flops(projector) / a_second / 3600),
        }
        for name, projector in {"this fit": own, **_rungs(own, work.num_patches)}.items()
    }


def price_lines(prices: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield the prices as people read them."""
    yield f"price     GPU hours on one {CARD} at a third of its peak (computed, not measured)"
    for name, price in prices.items():
        flop = price["flop_per_example"] / 1e9
        yield f"          {name:10} {flop:12,.4g} GFLOP an example {price['gpu_hours']:10,.3g} GPU hours"


def _rungs(own: ProjectorConfig, num_patches: int) -> dict[str, ProjectorConfig]:
    """Return linear projectors over the pooled state, patches averaged to 64, and all patches."""
    tokens = {"linear-1": ("linear", 1), "pooled-64": ("average_linear", 64), "patches": ("patch_linear", num_patches)}
    return {
        name: ProjectorConfig(kind=kind, num_features=own.num_features, width=own.width, num_image_tokens=count)
        for name, (kind, count) in tokens.items()
        if count <= num_patches
    }


def _work_of(plan: FitPlan) -> FitWork:
    start, training = plan.start, plan.config.training
    language = start.language_config
    vocabulary = language.vocab_size * language.hidden_size
    return FitWork(
        tower_parameters=start.clip_parameters,
        num_patches=start.tower_config.num_patches,
        language_parameters=start.llama_parameters - vocabulary * (1 if language.tie_word_embeddings else 2),
        logit_parameters=vocabulary,
        prompt_tokens=start.num_prompt_tokens,
        caption_tokens=_caption_tokens(plan),
        num_images=plan.labels.counts()["train"].num_images,
        num_examples=plan.num_steps * training.batch_size,
        adapter_parameters=start.adapter_parameters if training.lora_rank else 0,
        recomputes=training.gradient_checkpointing,
    )


def _caption_tokens(plan: FitPlan) -> float:
    """Return the mean length of the first captions, each with its end token, cut as the fit cuts them."""
    captions = plan.labels.split("train")["captions"].slice(0, _SAMPLED_CAPTIONS).to_pylist()
    texts = [text for of_image in captions for text in of_image][:_SAMPLED_CAPTIONS]
    longest = plan.config.training.max_caption_tokens
    lengths = [min(len(ids) + 1, longest) for ids in plan.language.tokenizer(texts, add_special_tokens=False).input_ids]
    return sum(lengths) / len(lengths) if lengths else float(longest)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
