"""The models on the device, made of random weights through the classes that a user's take, and how work is timed."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from captioner.config import DecodingConfig
from captioner.decoding import Engine, Request
from captioner.model.caption_model import CaptionModel
from captioner.model.cuda_graphs import recorder_for
from captioner.model.module import allocate, freeze
from captioner.model.projector import ProjectorConfig, build_projector
from captioner.model.prompt_writer import PromptWriter
from captioner.model.quick_gelu import fuse_quick_gelu
from captioner.model.template import DEFAULT_TEMPLATE, Template
from captioner.model.towers.clip import CLIP
from captioner.model.turns import FittedTurns
from captioner.model.vision import VisionEncoder
from tests.bench.decoding import SHORT, EndAt, caption_lengths
from tests.bench.report import take_turns
from tests.unit.model.tiny_models import llama3_tokenizer, preprocessor_config

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
CLIP_VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "image_size": 224,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


class Rig:
    """A caption model on a device; `is_tiny` makes every width, count and length small."""

    def __init__(self, device: torch.device, *, is_tiny: bool, rounds: int = 3, price: float = 2.5) -> None:
        self.device, self.is_tiny, self.rounds, self.price = device, is_tiny, rounds, price
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tiny = TINY | {"num_key_value_heads": 2, "vocab_size": 272} if is_tiny else {}
        self.llama_settings = LLAMA_3_8B | tiny
        self.clip_settings = CLIP_VIT_L_14 | (TINY | {"image_size": 28} if is_tiny else {})
        self.rows_per_slot = 4 if is_tiny else 16
        """Images for each slot: few enough to wait for, so many that filling and emptying the slots counts little."""

    @cached_property
    def model(self) -> CaptionModel:
        llama = self.llama_of(self.dtype)
        config = ProjectorConfig(
            kind="linear", num_features=self.clip_settings["hidden_size"], width=llama.config.hidden_size
        )
        tokenizer, side = self.tokenizer(), self.clip_settings["image_size"]
        return CaptionModel(
            vision=VisionEncoder(
                tower=fuse_quick_gelu(self.random(CLIPVisionModel, CLIPVisionConfig(**self.clip_settings), self.dtype)),
                family=CLIP,
                width=self.clip_settings["hidden_size"],
                image_size=side,
                pixel_scale=torch.full((3, 1, 1), 1 / 127.5, device=self.device),
                pixel_shift=torch.full((3, 1, 1), -1.0, device=self.device),
            ),
            projector=freeze(build_projector(config).to(self.device, self.dtype)),
            projector_config=config,
            llama=llama,
            tokenizer=tokenizer,
            template=Template.parse(DEFAULT_TEMPLATE, tokenizer),
            prompt_writer=PromptWriter(FittedTurns(DEFAULT_TEMPLATE), tokenizer),
            eos_token_ids=(),
            context_length=llama.config.max_position_embeddings,
            preprocessing=preprocessor_config(side),
            fingerprint="random",
        )

    def llama_of(self, dtype: torch.dtype, num_layers: int | None = None) -> LlamaForCausalLM:
        depth = {"num_hidden_layers": num_layers} if num_layers else {}
        return self.random(LlamaForCausalLM, LlamaConfig(**self.llama_settings | depth, eos_token_id=None), dtype)

    @torch.no_grad()
    def random(self, model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> Any:
        """Weights of a normal distribution, norms of 1, biases of 0."""
        torch.manual_seed(0)
        model = allocate(model_class, config, dtype=dtype, device=self.device)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "embedding" in name:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return freeze(model)

    def tokenizer(self) -> Any:
        return llama3_tokenizer() if self.is_tiny else llama3_tokenizer(num_words=128_000, num_special=256)

    def slots(self, number: int) -> int:
        return number // 16 if self.is_tiny else number

    def pixels(self, number: int) -> Tensor:
        side = self.clip_settings["image_size"]
        return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8)

    def seconds(self, work: Callable[[], object]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    def median_seconds(self, work: Callable[[], object], times: int) -> float:
        return statistics.median(self.seconds(work) for _ in range(times))

    def in_turn(self, ways: dict[str, Callable[[], object]]) -> list[dict[str, float]]:
        """Seconds of each way in each round, after one round to warm up."""
        seconds = take_turns(ways, self.rounds, clock=self.clock)
        return [dict(zip(ways, times, strict=True)) for times in zip(*seconds.values(), strict=True)]

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes."""
        source = torch.zeros(1 << (30 if self.device.type == "cuda" else 24), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * len(source) / min(self.seconds(lambda: target.copy_(source)) for _ in range(9))

    def clock(self) -> float:
        """Seconds, read once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to caption, timed against `generate` with the same options."""

    name: str
    slots: int
    lengths: tuple[int, int] = SHORT
    shared_len: int = 1
    is_compiled: bool = False
    """Whether `generate` also runs compiled, with its static cache: minutes for each case."""

    options: dict[str, Any]


class Workload:
    """The images of one case, as prefixes on the device, and the ways to caption them."""

    def __init__(self, rig: Rig, case: Case, *, is_recorded: bool = True) -> None:
        self.rig, self.llama = rig, rig.model.llama
        mean, most = (length // 5 for length in case.lengths) if rig.is_tiny else case.lengths
        self.decoding = DecodingConfig(max_new_tokens=most, **case.options)
        self.slots = rig.slots(case.slots)
        self.batch = self.slots // self.decoding.num_beams
        number, width = self.batch * rig.rows_per_slot, self.llama.config.hidden_size
        self.shared = torch.randn(case.shared_len, width).to(rig.device, rig.dtype)
        self.images = torch.randn(number, 1, width).to(rig.device, rig.dtype)
        self.lengths = caption_lengths(number, mean, most)
        self.num_generated = number // 4
        """Images that `generate` captions, the first ones."""
        self.engine = Engine(
            self.llama,
            decodings=[self.decoding],
            eos_token_ids=(),
            shared_prefix=self.shared,
            max_prefix_len=1,
            slots=self.slots,
            recorder=recorder_for(rig.device) if is_recorded else None,
        )

    def requests(self) -> Iterator[Request]:
        for i, (image, length) in enumerate(zip(self.images, self.lengths.tolist(), strict=True)):
            yield Request(i, image, seed=i, max_new_tokens=length)

    def ours(self) -> int:
        return sum(1 for _ in self.engine.generate(self.requests()))

    def fill(self, num_tokens: int) -> None:
        """Admit an image to every slot, each for so many tokens, and decode until mid caption."""
        self.engine.admit(
            [Request(i, one, max_new_tokens=num_tokens) for i, one in enumerate(self.images[: self.batch])]
        )
        for _ in range(4):
            self.engine.step()

    def generate(self, **cache: Any) -> None:
        for start in range(0, self.num_generated, self.batch):
            images, lengths = self.images[start : start + self.batch], self.lengths[start : start + self.batch]
            embeds = torch.cat([self.shared.expand(len(images), -1, -1), images], 1)
            self.llama.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=self.rig.device),
                max_new_tokens=self.decoding.max_new_tokens,  # each batch ends sooner; a static cache keeps its size
                stopping_criteria=[EndAt(lengths.to(self.rig.device))],
                do_sample=self.decoding.do_sample,
                num_beams=self.decoding.num_beams,
                pad_token_id=0,
                eos_token_id=None,
                disable_compile=self.rig.device.type != "cuda",
                **cache,
            )
