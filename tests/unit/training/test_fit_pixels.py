"""Fitting on patches: a step computes its features from pixels that a stream gives it, with all that a fit promises."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlamaForCausalLM

from captioner.training.fit.batches import IGNORED
from captioner.training.fit.fit_loop import fit_projector
from captioner.training.fit.projector import ProjectorFit
from captioner.training.fit.validation import Validation
from captioner.training.fit.worker_group import WorkerGroup
from tests.unit.model import tiny_models
from tests.unit.training import fitting_models as toys
from tests.unit.training.test_fit_loop import ThreadGroup, rows_without_time

PIXELS = toys.pixels(toys.NUM_TRAIN, seed=3)


KINDS = {"average_mlp": 4, "query": 3}
"""Image tokens of each."""


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return toys.save_model(tmp_path_factory.mktemp("patches"), kind=request.param, image_tokens=KINDS[request.param])


def examples_of(model):
    """Captions without features: what a fit on patches holds."""
    return toys.split(model, toys.NUM_TRAIN, seed=1)


def validation_of(model):
    examples = toys.validation(model, num_scored=3)
    images = toys.pixels(toys.NUM_VALIDATION, seed=4)
    return Validation(toys.replace(examples.examples, images=images), examples.references)


def fitted(folder, *, group=None, saved=None, asked=None, listener=None, **changes):
    """The last state of a fit."""
    model = toys.fresh(folder)

    def stream(batches):
        for batch in batches:
            if asked is not None:
                asked.append(batch.tolist())
            yield PIXELS[batch]

    settings = {"image_features": "patches", "max_caption_tokens": 8, "num_scored_images": 3, "checkpoint_every": 1}
    return fit_projector(
        model,
        examples_of(model),
        validation_of(model),
        toys.config(**{**settings, **changes}),
        group=group,
        pixels=stream,
        saved=saved,
        listener=listener,
    )


def interrupted(folder, steps, **changes):
    return toys.interrupted(lambda saved, listener: fitted(folder, saved=saved, listener=listener, **changes), steps)


def stopped(folder, step):
    stop = toys.Stop(step)
    with pytest.raises(toys.FitEndedError):
        fitted(folder, listener=stop.listener)
    return stop


def test_a_fit_that_is_interrupted_at_any_step_ends_with_the_bits_of_an_unbroken_one(folder):
    whole = fitted(folder, eval_every=3)
    assert whole.step > 15
    losses = [row["loss"] for row in whole.history]
    assert losses[-1] < losses[0]
    resumed = interrupted(folder, [1, 3, 10, 14], eval_every=3)
    assert rows_without_time(resumed) == rows_without_time(whole)
    assert all(torch.equal(weight, resumed.best.weights[name]) for name, weight in whole.best.weights.items())


def test_a_fit_on_crops_that_is_interrupted_in_any_epoch_ends_with_the_bits_of_an_unbroken_one(folder):
    crops = {"min_crop_area": 0.3}
    whole = fitted(folder, **crops)
    assert 8 < whole.step // 2 < 13, "in the first epoch, at its end, and in the second"
    resumed = interrupted(folder, [3, whole.step // 2, 13], **crops)
    assert rows_without_time(resumed) == rows_without_time(whole)
    uncropped = stopped(folder, 3).state
    assert rows_without_time(uncropped)[0] != rows_without_time(whole)[0]


def test_a_resumed_fit_asks_for_the_images_that_are_left_and_no_others(folder):
    whole, rest = [], []
    state = fitted(folder, asked=whole)
    fitted(folder, asked=rest, saved=stopped(folder, 4).saved)
    assert rest == whole[4:]
    assert len(whole) == state.step


@pytest.mark.parametrize(("size", "num_parts", "area"), [(2, 1, 1.0), (2, 3, 0.3)])
def test_workers_and_parts_change_no_loss_beyond_the_last_bits(folder, size, num_parts, area):
    alone = fitted(folder, batch_size=7, min_crop_area=area)
    place, barrier = [None] * size, threading.Barrier(size)

    def worker(rank):
        group = ThreadGroup(rank, size, place, barrier)
        settings = {"batch_size": 7, "gradient_accumulation_steps": num_parts, "min_crop_area": area}
        return fitted(folder, group=group, **settings)

    with ThreadPoolExecutor(size) as threads:
        for state in threads.map(worker, range(size)):
            assert state.best.captions == alone.best.captions
            for row, expected in zip(rows_without_time(state), rows_without_time(alone), strict=True):
                rough = {"grad_norm": row.get("grad_norm", 0)}  # the last bits of 17 steps add up in it
                assert rough == pytest.approx({"grad_norm": expected.get("grad_norm", 0)}, rel=1e-3)
                assert row | rough == pytest.approx(expected | rough, rel=1e-4)


def test_each_row_says_how_long_its_steps_waited_for_pixels(folder):
    rows = fitted(folder, max_steps=4, log_every=2).history
    assert all(row["wait_seconds"] > 0 for row in rows)


def test_the_projector_alone_has_a_gradient(folder):
    model = toys.fresh(folder)
    fit = ProjectorFit(model, toys.config(), num_steps=9, group=WorkerGroup())
    fit.loss_sum(examples_of(model).batch(np.arange(6), PIXELS[:6])).backward()
    modules = {"tower": model.vision_tower, "projector": fit.projector, "llama": model.llama}
    named = {f"{part}.{name}": weight for part, module in modules.items() for name, weight in module.named_parameters()}
    names = {f"projector.{name}" for name in model.projector_config.shapes}
    assert {name for name, weight in named.items() if weight.grad is not None} == names


@pytest.mark.parametrize(("kind", "image_tokens"), [("mlp", 16), ("average_mlp", 4)])
def test_the_gradient_of_a_step_is_that_of_plain_transformers_and_torch(tmp_path, kind, image_tokens):
    model = toys.fresh(toys.save_model(tmp_path, kind=kind, image_tokens=image_tokens))
    fit = ProjectorFit(model, toys.config(max_grad_norm=1e9), num_steps=20, group=WorkerGroup())
    weights = {name: weight.detach().clone().requires_grad_(True) for name, weight in fit.projector.named_parameters()}
    fit.optimizer.zero_grad = lambda **_: None
    batch = examples_of(model).batch(np.arange(9), PIXELS[:9])
    result = fit.step([batch], step=10)

    loss = plain_loss(tmp_path, model.template, batch, weights, image_tokens)
    loss.backward()
    assert float(result.loss_sum / result.num_tokens) == pytest.approx(loss.item(), rel=1e-6)
    for name, weight in fit.projector.named_parameters():
        expected = weights[name].grad
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def plain_loss(folder, template, batch, weights, image_tokens):
    """The mean loss of a caption token, by transformers' own classes and the formulas of the papers."""
    clip = CLIPVisionModel.from_pretrained(folder / "clip").eval()
    llama = LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    config = tiny_models.preprocessor_config()
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    with torch.no_grad():
        states = clip((batch.images / 255 - mean) / std, output_hidden_states=True).hidden_states[-2][:, 1:]
    if image_tokens == 4:  # means of 2 x 2 patches of a 4 x 4 grid
        states = states.view(len(states), 2, 2, 2, 2, -1).mean((2, 4)).flatten(1, 2)
    hidden = F.gelu(F.linear(states, weights["linear_1.weight"], weights["linear_1.bias"]))
    image = F.linear(hidden, weights["linear_2.weight"], weights["linear_2.bias"])
    embed = llama.get_input_embeddings()
    before, after = (embed(torch.tensor([ids] * len(batch))) for ids in (template.prefix_ids, template.suffix_ids))
    captions = embed(batch.labels.masked_fill(batch.labels == IGNORED, 0))
    prompt = torch.cat([before, image, after], dim=1)
    labels = torch.cat([torch.full(prompt.shape[:2], IGNORED), batch.labels], dim=1)
    return llama(inputs_embeds=torch.cat([prompt, captions], dim=1), labels=labels).loss
