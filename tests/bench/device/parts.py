"""The parts of the benchmark: what each measures, as a function of the rig."""

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, DynamicCache, LlamaForCausalLM

from captioner.captioning.captioner import Captioner
from captioner.captioning.resources import GPU_CALLS
from captioner.config import DecodingConfig
from captioner.decoding import Engine, Request
from captioner.model.bundle import load, save_bundle
from captioner.model.cuda_graphs import recorder_for
from captioner.model.image_encoder import ENCODE_ROWS, ImageEncoder
from captioner.model.template import Template
from tests.bench.decoding import LONG, SHORT, caption_lengths
from tests.bench.device.rig import Case, Rig, Workload
from tests.unit.decoding.decoding_models import assert_same_or_tied, token_ids
from tests.unit.model.tiny_models import preprocessor_config, write_json

Figures = dict[str, Any]

NINE_TOKENS = "<|begin_of_text|>" + "aaaaaaaa" + "{image}"
TARGETS: dict[tuple[str, str], float] = {
    ("step_recorded_128", "ms"): -5.7,
    ("greedy_mean14_128", "ratio"): 4.0,
    ("pixels_mean14_256", "images_per_s"): 1200.0,
    ("pixels_mean14_256_prompt9", "images_per_s"): 950.0,
    ("profile", "busy_share"): 0.9,
}
"""Targets on one H100, by part and figure: at least this, or, where negative, at most."""

CASES = (
    *(Case(name=f"greedy_mean14_{slots}", slots=slots, is_compiled=True, options={}) for slots in (128, 256, 64)),
    *(Case(name=f"greedy_mean60_{slots}", slots=slots, lengths=LONG, options={}) for slots in (64, 128, 256)),
    Case(name="greedy_mean14_128_prompt9", slots=128, shared_len=9, options={}),
    Case(name="beam4_mean14_128", slots=128, options={"num_beams": 4}),
    Case(name="sampling_mean14_128", slots=128, options={"do_sample": True}),
)


def parts(rig: Rig) -> dict[str, Callable[[], Figures]]:
    """Every part by name, the cheap and telling ones first."""
    steps = {
        f"step_{'recorded' if is_recorded else 'eager'}_{slots}": partial(step, rig, slots, is_recorded=is_recorded)
        for slots in (64, 128, 256)
        for is_recorded in (True, False)
    }
    return {
        "equality": partial(equality, rig),
        "logits": partial(logits, rig),
        "clip": partial(clip, rig),
        **steps,
        "pixels_mean14_256": partial(from_pixels, rig),
        "pixels_mean14_256_prompt9": partial(from_pixels, rig, template=NINE_TOKENS),
        "profile": partial(profiled, rig),
        "profile_256": partial(profiled, rig, slots=256),
        "profile_clip": partial(profiled_clip, rig),
        **{f"products_{rows}": partial(products, rig, rows) for rows in (128, 256)},
        **{case.name: partial(against_generate, rig, case) for case in CASES},
        "bundle": partial(bundle, rig),
    }


def clip(rig: Rig) -> Figures:
    """Pixels in the host's memory to prefixes on the device."""
    encoder = _encoder(rig)
    pixels = rig.pixels(encoder.num_rows)
    return {"images_per_s": len(pixels) / rig.median_seconds(lambda: encoder(pixels), 9)}


def step(rig: Rig, slots: int, *, is_recorded: bool) -> Figures:
    """Milliseconds a step at mid caption with all slots taken, and its floor: the bytes it reads over the bandwidth."""
    work = Workload(rig, Case(name="step", slots=slots, lengths=LONG, options={}), is_recorded=is_recorded)
    work.fill(24)
    seconds = rig.median_seconds(work.engine.step, 16)
    kv = work.engine._model.buffers.kv
    weights = sum(p.nbytes for name, p in work.llama.named_parameters() if "embed_tokens" not in name)
    num_columns = work.engine._model.layout.first_column + 12
    floor = (weights + kv.nbytes * num_columns // kv.shape[-2]) / rig.bandwidth
    return {
        "ms": seconds * 1e3,
        "floor_ms": floor * 1e3,
        "bandwidth_share": floor / seconds,
    }


def against_generate(rig: Rig, case: Case) -> Figures:
    """Captions a second of the engine, and of `generate` with whichever of its caches is faster here.

    `generate` captions the first few batches only: each is for itself, while the engine's slots need time to fill and
    to empty, which in a job counts once for all its images. ratio: of tokens a second."""
    work = Workload(rig, case)
    ways: dict[str, Callable[[], object]] = {"ours": work.ours, "dynamic": work.generate}
    if case.is_compiled:
        ways["static"] = partial(work.generate, cache_implementation="static")
    rounds = rig.in_turn(ways)
    medians = {name: statistics.median(seconds[name] for seconds in rounds) for name in ways}
    best = min(ways.keys() - {"ours"}, key=medians.__getitem__)
    ours, theirs = int(work.lengths.sum()), int(work.lengths[: work.num_generated].sum())  # tokens
    ratios = [seconds[best] / theirs / (seconds["ours"] / ours) for seconds in rounds]
    return {
        "captions_per_s": len(work.images) / medians["ours"],
        "generate_per_s": work.num_generated / medians[best],
        "cache": best,
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def from_pixels(rig: Rig, template: str | None = None) -> Figures:
    """Images a second through `Captioner.caption_pixels`, as a job's calls make it: several at once, from pixels.

    slots_filled: share of all slots and steps that wrote a token, fill and drain included."""
    model = rig.model if template is None else replace(rig.model, template=Template.parse(template, rig.tokenizer()))
    mean, most = (length // 5 for length in SHORT) if rig.is_tiny else SHORT
    slots = rig.slots(256)
    captioner = Captioner(model, DecodingConfig(max_new_tokens=most), slots=str(slots))
    lengths = dict(enumerate(caption_lengths(slots * rig.rows_per_slot, mean, most).tolist()))
    end_after(captioner, lengths)
    steps = _counted_steps(captioner)
    pixels = rig.pixels(len(lengths))
    batches = [(pixels[part], [str(n) for n in part.tolist()]) for part in torch.arange(len(pixels)).split(slots)]

    def caption() -> None:
        with ThreadPoolExecutor(GPU_CALLS) as pool:
            list(pool.map(lambda batch: captioner.caption_pixels(*batch), batches))

    caption()
    steps.clear()
    rates = [len(pixels) / rig.seconds(caption) for _ in range(rig.rounds)]
    captioner.close()
    rate = statistics.median(rates)
    return {
        "images_per_s": rate,
        "spread": [min(rates), max(rates)],
        "slots_filled": sum(lengths.values()) * rig.rounds / len(steps) / slots,
        "dollars_per_million": rig.price / 3600 / rate * 1e6,
    }


def equality(rig: Rig) -> Figures:
    """Captions of recorded steps against eager ones in float32 at two layers: the same, or parted at a tie."""
    llama, width = rig.llama_of(torch.float32, num_layers=2), rig.llama_settings["hidden_size"]
    shared, images = torch.randn(1, width, device=rig.device), torch.randn(100, 1, width, device=rig.device)
    found = []
    for recorder in (recorder_for(rig.device), None):
        engine = _engine(llama, shared, slots=rig.slots(512), recorder=recorder)
        done = engine.generate(Request(i, image) for i, image in enumerate(images))
        found.append(sorted(done, key=lambda generation: generation.id))
    recorded, eager = found
    prefixes = [torch.cat([shared, image]).cpu() for image in images]
    assert_same_or_tied(llama.cpu(), prefixes, recorded, token_ids(eager), eos_token_ids=())
    num_same = sum(mine == other for mine, other in zip(token_ids(recorded), token_ids(eager), strict=True))
    return {"captions": len(images), "same": num_same}


@torch.inference_mode()
def logits(rig: Rig) -> Figures:
    """Relative error of bf16 logits after twelve tokens, of the engine and of transformers' own cache."""
    exact, width = rig.llama_of(torch.float32, num_layers=4), rig.llama_settings["hidden_size"]
    rounded = rig.llama_of(torch.bfloat16, num_layers=4)
    rounded.load_state_dict(exact.state_dict())
    shared, images = (torch.randn(number, width, device=rig.device).bfloat16() for number in (1, 16))
    engine = _engine(rounded, shared, slots=16, recorder=recorder_for(rig.device), max_new_tokens=13)
    engine.admit([Request(i, image[None]) for i, image in enumerate(images)])
    for _ in range(12):
        engine.step()
    written = torch.from_numpy(engine._strategy._sequences._token_ids[:16, :12]).to(rig.device)
    engine.step()
    ours = engine._model.newest_logits(torch.arange(16, device=rig.device))
    prefixes = torch.stack([torch.cat([shared, image[None]]) for image in images])
    truth = exact(inputs_embeds=torch.cat([prefixes.float(), exact.model.embed_tokens(written)], 1)).logits[:, -1]
    cache = DynamicCache(config=rounded.config)
    theirs = rounded(inputs_embeds=prefixes, past_key_values=cache).logits
    for column in written.T:
        theirs = rounded(input_ids=column[:, None], past_key_values=cache).logits
    errors = {"engine_error": ours, "transformers_error": theirs[:, -1].float()}
    return {name: float((found - truth).norm() / truth.norm()) for name, found in errors.items()}


def profiled(rig: Rig, slots: int = 128) -> Figures:
    """Share of 32 steps' time in which the device works, and the kernels that take most of it."""
    work = Workload(rig, Case(name="profile", slots=slots, lengths=LONG, options={}))
    work.fill(48)
    return _profile(rig, work.engine.step, times=32)


def profiled_clip(rig: Rig) -> Figures:
    """The same of eight calls of the encoder."""
    encoder = _encoder(rig)
    pixels = rig.pixels(encoder.num_rows)
    encoder(pixels)
    return _profile(rig, lambda: encoder(pixels), times=8)


def _profile(rig: Rig, work: Callable[[], object], times: int) -> Figures:
    """Share of the time in which the device works, and milliseconds a call by kernel."""
    is_cuda = rig.device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        wall = rig.seconds(lambda: [work() for _ in range(times)])
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events()
        if (event.device_type == torch.autograd.DeviceType.CUDA) == is_cuda
    ]
    by_name: dict[str, float] = {}
    for start, end, name in spans:
        by_name[name[:60]] = by_name.get(name[:60], 0.0) + (end - start) / times / 1e3
    top = sorted(by_name.items(), key=lambda item: -item[1])[:16]
    busy_s = _union([span[:2] for span in spans]) / 1e6
    return {
        "busy_share": busy_s / wall,
        "ms": wall / times * 1e3,
        "kernels": len(spans) / times,
        "by_kernel": dict(top),
    }


@torch.inference_mode()
def products(rig: Rig, rows: int = 128) -> Figures:
    """Microseconds of each product of a layer and of the head, and on a card those of its fp8 counterpart."""
    width, inner = rig.llama_settings["hidden_size"], rig.llama_settings["intermediate_size"]
    kv = width // rig.llama_settings["num_attention_heads"] * rig.llama_settings["num_key_value_heads"]
    shapes = {
        "qkv": (width + 2 * kv, width),
        "o": (width, width),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
    }
    shapes["head"] = (rig.llama_settings["vocab_size"], width)
    found: Figures = {}
    for name, shape in shapes.items():
        weights = [torch.randn(shape, device=rig.device).to(rig.dtype) for _ in range(4)]  # more than a cache holds
        ins = torch.randn(rows, shape[1], device=rig.device).to(rig.dtype)
        found[f"{name}_us"] = _microseconds(rig, [partial(linear, ins, weight) for weight in weights])
        found[f"{name}_floor_us"] = weights[0].nbytes / rig.bandwidth * 1e6
        if rig.device.type == "cuda":
            scales = torch.ones(rows, 1, device=rig.device), torch.ones(1, shape[0], device=rig.device)
            small, smalls = ins.to(torch.float8_e4m3fn), [weight.to(torch.float8_e4m3fn).t() for weight in weights]
            of_fp8 = partial(torch._scaled_mm, out_dtype=rig.dtype, use_fast_accum=True)
            found[f"{name}_fp8_us"] = _microseconds(rig, [partial(of_fp8, small, one, *scales) for one in smalls])
    return found


def _microseconds(rig: Rig, works: Sequence[Callable[[], object]]) -> float:
    """Return what one of the works takes when all run one after another eight times, recorded where that pays."""
    recorder = recorder_for(rig.device)

    def run() -> None:
        for _ in range(8):
            for work in works:
                work()

    replay = recorder(run).replay if recorder else run
    return rig.median_seconds(replay, 9) / 8 / len(works) * 1e6


def bundle(rig: Rig) -> Figures:
    """A bundle of this width and few layers, saved, loaded on the device and captioned with."""
    with TemporaryDirectory() as path:
        _save_bundle(rig, Path(path))
        loaded: list[Any] = []
        seconds = rig.seconds(lambda: loaded.append(load(path, device=rig.device.type, dtype=str(rig.dtype)[6:])))
        captioner = Captioner(loaded[0], DecodingConfig(max_new_tokens=14), slots=str(rig.slots(256)))
        captions = captioner.caption_pixels(rig.pixels(64), [str(n) for n in range(64)])
        captioner.close()
    return {"load_s": seconds, "captioned": len(captions)}


def _encoder(rig: Rig) -> ImageEncoder:
    return ImageEncoder(rig.model, num_rows=ENCODE_ROWS["cuda"], is_scored=False, recorder=recorder_for(rig.device))


def _engine(llama: LlamaForCausalLM, shared: torch.Tensor, *, max_new_tokens: int = 16, **settings: Any) -> Engine:
    decoding = DecodingConfig(max_new_tokens=max_new_tokens)
    return Engine(llama, decodings=[decoding], eos_token_ids=(), shared_prefix=shared, max_prefix_len=1, **settings)


def end_after(captioner: Captioner, lengths: dict[int, int]) -> None:
    """Give each image's request its own limit: random weights would never end a caption."""
    submit = captioner.engine.submit
    captioner.engine.submit = lambda requests: submit(
        [replace(request, max_new_tokens=lengths[int(request.id)]) for request in requests]
    )


def _counted_steps(captioner: Captioner) -> list[None]:
    """Return a list that grows by one with each step of the captioner's engine."""
    steps: list[None] = []
    engine = captioner.engine._engine
    begin_step = engine.begin_step
    engine.begin_step = lambda: steps.append(None) or begin_step()
    return steps


def _save_bundle(rig: Rig, folder: Path) -> None:
    tower = rig.clip_settings | {"num_hidden_layers": 2, "projection_dim": 64}
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**tower).to_dict(), projection_dim=64)
    rig.random(CLIPModel, config, rig.dtype).save_pretrained(folder / "clip")
    write_json(folder / "clip/preprocessor_config.json", preprocessor_config(rig.clip_settings["image_size"]))
    llama = rig.llama_of(rig.dtype, num_layers=2)
    llama.config.bos_token_id = llama.config.eos_token_id = rig.tokenizer().eos_token_id
    llama.save_pretrained(folder / "llama")
    rig.tokenizer().save_pretrained(folder / "llama")
    save_bundle(folder, rig.model.projector, rig.model.projector_config, clip="clip", llama="llama")


def _union(spans: list[tuple[float, float]]) -> float:
    """Length of what the spans cover together."""
    spans = sorted(spans)
    reached = accumulate((end for _, end in spans), max, initial=float("-inf"))
    return sum(max(0.0, end - max(start, before)) for (start, end), before in zip(spans, reached, strict=False))
