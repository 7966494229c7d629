"""What a fit costs, held to figures that were published and to the operations that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from captioner.cluster.projector_training import fit_projector
from captioner.command_line import parse
from captioner.config import FitConfig
from captioner.model.projector_config import ProjectorConfig
from captioner.training.fit.batches import Batch
from captioner.training.fit.fit_price import FitWork, price_lines
from captioner.training.fit.projector import ProjectorFit
from captioner.training.fit.worker_group import WorkerGroup
from tests.labelled_scenes import write_labels
from tests.unit.model import tiny_models
from tests.unit.training import fitting_models as toys

LLAVA = FitWork(
    tower_parameters=303_000_000,
    num_patches=576,
    language_parameters=6_476_000_000,
    logit_parameters=131_000_000,
    prompt_tokens=1,
    caption_tokens=25,
    num_images=558_000,
    num_examples=558_000,
)


def projector(kind: str, tokens: int) -> ProjectorConfig:
    return ProjectorConfig(kind=kind, num_features=1024, width=4096, num_image_tokens=tokens)


def test_a_third_of_the_peak_gives_the_hours_of_the_first_stage_of_llava():
    a100_hours = LLAVA.flops(projector("mlp", 576)) / (312e12 / 3) / 3600
    assert a100_hours == pytest.approx(8 * 3.5, rel=0.15)


def test_activations_that_are_computed_again_cost_half_of_the_language_model_more():
    again = FitWork(**{**vars(LLAVA), "recomputes": True})
    linear = projector("linear", 1)
    assert again.example_flops(linear) / LLAVA.example_flops(linear) == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(("kind", "tokens"), [("linear", 2), ("mlp", 16), ("average_linear", 4), ("query", 5)])
def test_an_example_costs_about_what_torch_counts(tmp_path, kind, tokens):
    model = toys.fresh(toys.save_model(tmp_path, kind=kind, image_tokens=tokens))
    fit = ProjectorFit(model, toys.config(), num_steps=9, group=WorkerGroup())
    length, examples = 9, 8
    reads_patches = model.projector_config.reads_patches
    images = torch.from_numpy(toys.pixels(examples, seed=0) if reads_patches else toys.features(examples, seed=0))
    ids = torch.zeros(examples, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        fit.loss_sum(Batch(images, ids[:, 1:], ids)).backward()
    language = model.llama.config
    vocabulary = language.vocab_size * language.hidden_size
    work = FitWork(
        tower_parameters=sum(weight.numel() for weight in model.vision_tower.parameters()),
        num_patches=16,
        language_parameters=sum(weight.numel() for weight in model.llama.model.parameters()) - vocabulary,
        logit_parameters=vocabulary,
        prompt_tokens=model.template.num_tokens,
        caption_tokens=length,
        num_images=1,
        num_examples=1,
    )
    assert work.example_flops(model.projector_config) == pytest.approx(counted.get_total_flops() / examples, rel=0.15)


def test_a_dry_run_tells_the_price_of_its_rung_and_of_those_beside_it(tmp_path, capsys):
    parts = str(tiny_models.save_clip(tmp_path / "clip")), str(tiny_models.save_llama(tmp_path / "llama"))
    labels = str(write_labels(tmp_path, {"train": 9, "validation": 3}))
    words = [labels, str(tmp_path / "out"), "--clip", parts[0], "--llama", parts[1], "--image-tokens", "3", "--dry-run"]
    prices = fit_projector(parse(FitConfig, words))["prices"]
    assert list(prices) == ["this fit", "linear-1", "patches"]  # its 16 patches are fewer than 64
    flops = {name: price["flop_per_example"] for name, price in prices.items()}
    assert flops["linear-1"] < flops["this fit"] < flops["patches"]
    num_examples = 256  # one step: 18 captions are less than a batch
    hours = num_examples * flops["patches"] / (989e12 / 3) / 3600
    assert prices["patches"]["gpu_hours"] == pytest.approx(hours, rel=1e-3)
    assert "price     GPU hours on one H100 of 80 GB at a third of its peak" in capsys.readouterr().err


def test_people_read_the_price_of_each_rung():
    lines = list(price_lines({"this fit": {"flop_per_example": 2.5e12, "gpu_hours": 12.34}}))
    assert "at a third of its peak (computed, not measured)" in lines[0]
    assert "this fit          2,500 GFLOP an example       12.3 GPU hours" in lines[1]
