"""One step of a fit: the loss of a batch, its gradient over all workers, AdamW, the learning rate.

The projector is trained, and the adapter of a model that has one; nothing else has a gradient. LLaMA reads what it
reads when it captions: the template's prompt, the image, then the caption. The loss is that of every caption token and
the end token, given those before (teacher forcing).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from captioner.config import TrainingConfig
from captioner.model.adapted_layers import adapter_weights
from captioner.model.caption_model import CaptionModel
from captioner.model.tokenizer import Tokenizer
from captioner.training.fit.batches import Batch
from captioner.training.fit.random_crops import cropped
from captioner.training.fit.worker_group import WorkerGroup

__all__ = ["ProjectorFit", "StepResult", "describe_trained", "end_token_id", "learning_rate"]

_BETAS = (0.9, 0.98)
_END_OF_TURN = "<|eot_id|>"


@dataclass(frozen=True)
class StepResult:
    """Results of one step over all workers, on the device: nothing waits for them."""

    loss_sum: Tensor
    """float32: negative log likelihood of all tokens of the step, before the update."""

    num_tokens: Tensor
    """float32: number of these tokens."""

    grad_norm: Tensor
    """float32: norm of the gradient before clipping."""


class ProjectorFit:
    """A model whose projector and adapter are trained: float32 weights, computed in LLaMA's dtype."""

    trained: dict[str, nn.Parameter]
    """What has a gradient, by name: the projector's weights, unless they stay as they are, and the adapter's."""

    def __init__(self, model: CaptionModel, config: TrainingConfig, *, num_steps: int, group: WorkerGroup) -> None:
        self.config = config
        self.group = group
        self.num_steps = num_steps
        self.projector = model.projector.float().requires_grad_(config.learning_rate > 0)
        self.model = replace(model, projector=self.projector)
        self._prompt = model.prompt_embeddings()
        adapter = adapter_weights(model.llama)
        for weight in adapter.values():
            weight.requires_grad_(True)
        learning = {name: weight for name, weight in self.projector.named_parameters() if weight.requires_grad}
        groups, self._peaks = _groups(learning, adapter, config)
        self.trained = learning | adapter
        self._weights = list(self.trained.values())
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS)
        llama: Any = model.llama
        llama.eval()
        if config.gradient_checkpointing:
            llama.activation_checkpointing_enable({"use_reentrant": False})

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return the negative log likelihood of a batch's caption tokens, summed: float32, on the device."""
        device = self.model.device
        images = batch.images.to(device, non_blocking=True)
        if batch.boxes is not None:
            images = cropped(images, batch.boxes.to(device, non_blocking=True))
        image_embeds = self.embed(images)
        llama: Any = self.model.llama
        with self.autocast():
            request = self.model.request_embeddings(image_embeds)
            caption = llama.get_input_embeddings()(batch.input_ids.to(device, non_blocking=True))
            prompt = self._prompt.expand(len(request), -1, -1)
            states = llama.model(
                inputs_embeds=torch.cat([prompt, request, caption], dim=1), use_cache=False
            ).last_hidden_state
            first = self.model.num_prompt_tokens - 1  # its state predicts the first token of the caption
            places = batch.loss_positions.to(device, non_blocking=True)
            logits = llama.lm_head(states[:, first:].flatten(0, 1).index_select(0, places))
        return F.cross_entropy(logits.float(), batch.targets.to(device, non_blocking=True), reduction="sum")

    def embed(self, images: Tensor) -> Tensor:
        """Return the embeddings that LLaMA reads for each image: float[B, k, D], on the device.

        images: as in Batch, on the device. Of pixels the tower computes the features here, without a gradient."""
        features = self.model.features(images) if images.dtype == torch.uint8 else images
        with self.autocast():
            embeddings: Tensor = self.projector(features.float())
        return embeddings

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in LLaMA's dtype inside the block."""
        dtype = self.model.dtype
        with torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32):
            yield

    def step(self, batches: Iterable[Batch], *, step: int) -> StepResult:
        """Update the weights against this worker's share of a step; all workers end with the same weights.

        Gradients, loss and tokens of all workers and parts are summed in one exchange and divided by all tokens, so the
        number of workers does not change the result. (DistributedDataParallel would give the mean of the workers'
        means, where a token of a worker with few tokens counts more, and it needs an example on every worker.)
        """
        loss_sum, num_tokens = torch.zeros((), device=self.model.device), 0
        with self._checkpointing():
            for batch in batches:
                loss = self.loss_sum(batch)
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += loss.detach()
                num_tokens += len(batch.loss_positions)
        totals = self._exchange(loss_sum, num_tokens)
        grad_norm = nn.utils.clip_grad_norm_(self._weights, self.config.max_grad_norm)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = self._rate(step, peak)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(totals[0], totals[1], grad_norm)

    def learning_rates(self, step: int) -> dict[str, float]:
        """Return the learning rates of a step, counted from 0: the projector's, and the adapter's if there is one."""
        rates = {"learning_rate": self._rate(step, self.config.learning_rate)}
        if self.config.lora_rank:
            rates["lora_learning_rate"] = self._rate(step, self.config.lora_learning_rate)
        return rates

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights that it knows on the CPU: the projector's, and the adapter's if there is one.

        The names of an adapter's weights hold `lora_`."""
        found = {**self.projector.state_dict(), **adapter_weights(self.model.llama)}
        return {name: weight.detach().cpu().clone() for name, weight in found.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take such weights."""
        mine = {**self.projector.state_dict(), **adapter_weights(self.model.llama)}
        assert mine.keys() == weights.keys(), mine.keys() ^ weights.keys()
        with torch.no_grad():
            for name, weight in mine.items():
                weight.copy_(weights[name])

    def _rate(self, step: int, peak: float) -> float:
        warmup = self.config.warmup_steps
        warmup = math.ceil(0.03 * self.num_steps) if warmup is None else warmup
        return learning_rate(step, peak=peak, warmup_steps=warmup, num_steps=self.num_steps)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Keep no activations inside the block, if the config says so: transformers does so in training mode alone.

        A LLaMA has no dropout that the mode would turn on."""
        if not self.config.gradient_checkpointing:  # spares two walks over all modules a step
            yield
            return
        self.model.llama.train()
        try:
            yield
        finally:
            self.model.llama.train(False)

    def _exchange(self, loss_sum: Tensor, num_tokens: int) -> Tensor:
        """Set the gradient of every weight to the mean over all workers' tokens; return loss sum and tokens of all."""
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        totals = torch.stack([loss_sum, torch.full_like(loss_sum, num_tokens)])
        flat = self.group.sum(torch.cat([totals, *(gradient.flatten() for gradient in gradients)]))
        totals, summed = flat[:2], flat[2:] / flat[1]
        start = 0
        for weight in self._weights:
            weight.grad = summed[start : start + weight.numel()].view_as(weight)
            start += weight.numel()
        return totals


def describe_trained(names: Iterable[str]) -> str:
    """Return for people which weights have a gradient: names, those of layers by what all layers share."""
    shared = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ",".join(shared)


def _groups(
    learning: Mapping[str, Tensor], adapter: Mapping[str, Tensor], config: TrainingConfig
) -> tuple[list[dict[str, Any]], list[float]]:
    """Return AdamW's groups of the projector's and the adapter's weights, and the peak learning rate of each."""
    matrices = [weight for weight in learning.values() if weight.ndim > 1]
    vectors = [weight for weight in learning.values() if weight.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    peaks = [config.learning_rate, config.learning_rate]
    if adapter:
        groups.append({"params": list(adapter.values()), "weight_decay": config.weight_decay})
        peaks.append(config.lora_learning_rate)
    return groups, peaks


def learning_rate(step: int, *, peak: float, warmup_steps: int, num_steps: int) -> float:
    """Return a rate that rises linearly to `peak` in the warm-up and falls to 0 along a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def end_token_id(tokenizer: Tokenizer | PreTrainedTokenizerFast, template: str, eos_token_ids: Sequence[int]) -> int:
    """Return the token that ends a caption: the end of turn in a chat template, else the end of text."""
    if _END_OF_TURN in template:
        return int(tokenizer.get_added_vocab()[_END_OF_TURN])
    own = tokenizer.eos_token_id
    return int(own) if own is not None and own in eos_token_ids else eos_token_ids[0]
