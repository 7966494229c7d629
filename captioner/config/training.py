"""Flags for the training of a projector."""

import math
from dataclasses import dataclass
from typing import Literal

from captioner.config.checks import check, flag_name

__all__ = ["TrainingConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the projector is trained. An example is one caption with its image; a step is one update of the weights."""

    projector: Literal["linear", "mlp", "query"] = "linear"
    """What turns --image-features into --image-tokens embeddings: one linear map, two with a GELU between, or as many
    learned queries, which attend to the patches."""

    image_features: Literal["pooled", "patches"] = "pooled"
    """What the projector reads of an image: CLIP's pooled state, computed once and kept, or the states of its patches,
    computed in each step from pixels that are streamed into the workers and never kept."""

    image_tokens: int | None = None
    """Embeddings that LLaMA reads for one image. By default 1 of the pooled state, and one for each patch; fewer of
    patches are averages over a square grid, so that the number is a square, as 64; with --projector query any."""

    min_crop_area: float = 1.0
    """Least share of an image, above 0 to 1, that a step shows with --image-features patches: a random resized crop,
    another one in each epoch, as 0.5. 1 shows whole images. Validation images are whole."""

    epochs: int = 1
    """Passes over the examples."""

    captions_per_epoch: Literal["all", "one"] = "all"
    """What an epoch shows of an image that has several captions: all of them, or one, drawn for each epoch."""

    max_steps: int | None = None
    """Steps to take, whatever --epochs says."""

    batch_size: int = 256
    """Examples of one step, over all workers and micro-batches: the weights do not depend on their number."""

    gradient_accumulation_steps: int = 1
    """Micro-batches in which each worker computes its share of a step; more take less memory."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, reached after the warm-up; a cosine then lowers it to 0. With --lora-rank that of
    the projector alone; 0 leaves the projector as it is."""

    lora_rank: int = 0
    """Rank of a LoRA adapter of the language model, which learns beside the projector; 0 for none."""

    lora_modules: tuple[str, ...] = ()
    """Linear maps of each layer of the language model that are adapted, as `q_proj,v_proj`. By default all of them."""

    lora_alpha: float | None = None
    """An update of the adapter is scaled by this over --lora-rank. By default twice the rank."""

    lora_learning_rate: float = 2e-4
    """Peak learning rate of the adapter."""

    warmup_steps: int | None = None
    """Warm-up steps, in which the learning rate rises. By default 3 % of all steps."""

    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices."""

    max_grad_norm: float = 1.0
    """Clip the gradient norm to this."""

    seed: int = 0
    """Seed of the initial weights and of the order of the examples."""

    max_caption_tokens: int = 64
    """Longest caption, in tokens, for training and for validation; longer labels are truncated."""

    gradient_checkpointing: bool = False
    """Recompute LLaMA's activations in the backward pass instead of keeping them: slower, far less memory."""

    log_every: int = 10
    """Steps between two lines of progress and of metrics.jsonl."""

    eval_every: int | None = None
    """Steps between two evaluations.
    By default a twentieth of the fit, but at least 250 and at most an epoch."""

    checkpoint_every: int | None = None
    """Steps between two checkpoints; one is also saved every three minutes.
    By default a twentieth of the fit, but at least 250 and at most an epoch."""

    num_measured_images: int = 1000
    """Random validation images whose captions give the loss at each evaluation."""

    num_scored_images: int = 200
    """How many of these are captioned and scored with BLEU and CIDEr-D at each evaluation; 0 for none."""

    keep_best_by: Literal["val_loss", "cider"] = "val_loss"
    """Which weights are saved: those with the lowest loss, or the highest CIDEr-D, on the validation split."""

    early_stop: int = 0
    """End the fit after this many evaluations without a better one; 0 for never."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_modules", tuple(self.lora_modules))  # a recorded config has a list
        counts = ("epochs", "batch_size", "gradient_accumulation_steps", "max_caption_tokens")
        for name in (*counts, "num_measured_images"):
            check(getattr(self, name) >= 1, flag_name(name), getattr(self, name), "at least 1")
        for name in ("image_tokens", "max_steps", "log_every", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            check(value is None or value >= 1, flag_name(name), value, "at least 1")
        for name in ("max_grad_norm", "lora_learning_rate", "lora_alpha"):
            value = getattr(self, name)
            check(value is None or 0 < value < math.inf, flag_name(name), value, "more than 0")
        expected = "0 or more" if self.lora_rank else "more than 0, or 0 with --lora-rank"
        has_rate = 0 < self.learning_rate < math.inf or (self.learning_rate == 0 and self.lora_rank > 0)
        check(has_rate, "--learning-rate", self.learning_rate, expected)
        for name in ("lora_modules", "lora_alpha"):
            is_used = self.lora_rank > 0 or not getattr(self, name)
            check(is_used, flag_name(name), getattr(self, name), "none without --lora-rank")
        check(0 < self.min_crop_area <= 1, "--min-crop-area", self.min_crop_area, "more than 0, at most 1")
        is_at_hand = self.min_crop_area == 1 or self.image_features == "patches"
        check(is_at_hand, "--min-crop-area", self.min_crop_area, "1: kept features are those of whole images")
        for name in ("lora_rank", "warmup_steps", "weight_decay", "num_scored_images", "early_stop", "seed"):
            value = getattr(self, name)
            check(value is None or 0 <= value < math.inf, flag_name(name), value, "0 or more")
        self._check_image_tokens()
        fewest = self.gradient_accumulation_steps
        check(self.batch_size >= fewest, "--batch-size", self.batch_size, f"at least its {fewest} parts")
        most = self.num_measured_images
        is_known = self.num_scored_images <= most
        check(is_known, "--num-scored-images", self.num_scored_images, f"at most --num-measured-images ({most})")
        is_scored = self.keep_best_by == "val_loss" or self.num_scored_images > 0
        check(is_scored, "--num-scored-images", self.num_scored_images, "more than 0 with --keep-best-by cider")

    def _check_image_tokens(self) -> None:
        asked, reads_patches = self.image_tokens, self.image_features == "patches"
        if self.projector == "query":
            check(reads_patches, "--image-features", self.image_features, "patches, which --projector query attends to")
            check(asked is not None, "--image-tokens", asked, "a number with --projector query, as 32: its queries")
        elif reads_patches and asked is not None:
            wanted = (
                "a square with --image-features patches, as 64: patches are averaged over a grid; or --projector query"
            )
            check(math.isqrt(asked) ** 2 == asked, "--image-tokens", asked, wanted)
