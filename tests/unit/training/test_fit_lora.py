"""Fitting with LoRA: what has gradients, that they are those of plain peft, and all that a fit promises."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlamaForCausalLM

from captioner.training.fit.batches import IGNORED
from captioner.training.fit.fit_loop import fit_projector
from captioner.training.fit.projector import ProjectorFit
from captioner.training.fit.worker_group import WorkerGroup
from tests.unit.model import tiny_models
from tests.unit.training import fitting_models as toys
from tests.unit.training.test_fit_loop import ThreadGroup, rows_without_time
from tests.unit.training.test_fit_pixels import validation_of

PIXELS = toys.pixels(toys.NUM_TRAIN, seed=3)
RUNGS = {"pooled": ("linear", 2), "patches": ("average_mlp", 4)}
MAPS = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
LORA_NAMES = {f"{name}.lora_{matrix}.weight" for name in MAPS for matrix in ("A", "B")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: toys.save_model(tmp_path_factory.mktemp(name), kind=kind, image_tokens=tokens, lora=toys.LORA)
        for name, (kind, tokens) in RUNGS.items()
    }


def fresh(folder, dtype="float32"):
    return toys.fresh(folder, dtype, merges_adapter=False)


def config(**changes):
    return toys.config(lora_rank=3, lora_learning_rate=3e-2, **changes)


def fit_of(model, **changes):
    return ProjectorFit(model, config(**changes), num_steps=20, group=WorkerGroup())


def batch_of(model, rung, count=6):
    rows = np.arange(count)
    return toys.train_split(model).batch(rows, PIXELS[rows] if rung == "patches" else None)


def fitted(folder, rung, *, group=None, saved=None, listener=None, **changes):
    """The last state of a fit."""
    model = fresh(folder)
    settings = config(**{"max_caption_tokens": 8, "num_scored_images": 3, "checkpoint_every": 1, **changes})
    on_pixels = rung == "patches"
    return fit_projector(
        model,
        toys.train_split(model),
        validation_of(model) if on_pixels else toys.validation(model, num_scored=3),
        settings,
        group=group,
        pixels=toys.stream_of(PIXELS) if on_pixels else None,
        saved=saved,
        listener=listener,
    )


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_projector_and_adapter_have_gradients_and_nothing_else(folders, rung, is_checkpointed):
    fit = fit_of(fresh(folders[rung]), gradient_checkpointing=is_checkpointed)
    with fit._checkpointing():
        fit.loss_sum(batch_of(fit.model, rung)).backward()
    modules = {"tower": fit.model.vision_tower, "projector": fit.projector, "llama": fit.model.llama}
    named = {f"{part}.{name}": weight for part, module in modules.items() for name, weight in module.named_parameters()}
    found = {name.replace(".default", "") for name, weight in named.items() if weight.grad is not None}
    own = (
        {"weight", "bias"}
        if rung == "pooled"
        else {f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    )
    assert found == {f"projector.{name}" for name in own} | {f"llama.{name}" for name in LORA_NAMES}
    assert fit.trained.keys() == own | LORA_NAMES


@pytest.mark.parametrize("rung", RUNGS)
def test_a_step_changes_projector_and_adapter_each_at_its_own_rate(folders, rung):
    fit = fit_of(fresh(folders[rung]), learning_rate=1e-3, max_grad_norm=1e9)
    frozen = {name: weight.clone() for name, weight in fit.model.llama.state_dict().items() if "lora_" not in name}
    before = fit.weights()
    fit.step([batch_of(fit.model, rung)], step=5)
    moved = {name: float((weight - before[name]).abs().max()) for name, weight in fit.weights().items()}
    rates = fit.learning_rates(5)
    assert rates["lora_learning_rate"] == pytest.approx(30 * rates["learning_rate"])
    for name, distance in moved.items():
        rate = rates["lora_learning_rate" if "lora_" in name else "learning_rate"]
        assert distance == pytest.approx(rate, rel=0.01), name  # AdamW's first step is its rate
    llama = fit.model.llama.state_dict()
    assert all(torch.equal(weight, llama[name]) for name, weight in frozen.items())


def test_a_learning_rate_of_0_leaves_the_projector_as_it_is(folders):
    fit = fit_of(fresh(folders["patches"]), learning_rate=0.0, gradient_checkpointing=True)
    before = fit.weights()
    fit.step([batch_of(fit.model, "patches")], step=5)
    changed = {name for name, weight in fit.weights().items() if not torch.equal(weight, before[name])}
    assert changed == LORA_NAMES == fit.trained.keys()


@pytest.mark.parametrize("rung", RUNGS)
def test_a_fit_that_is_interrupted_at_any_step_ends_with_the_bits_of_an_unbroken_one(folders, rung):
    def fit(saved=None, listener=None):
        return fitted(folders[rung], rung, saved=saved, listener=listener, eval_every=3)

    whole = fit()
    assert whole.step > 15
    losses = [row["loss"] for row in whole.history]
    assert losses[-1] < losses[0]
    assert {"learning_rate", "lora_learning_rate"} <= whole.history[-1].keys()
    resumed = toys.interrupted(fit, [1, 3, 10, 14])
    assert rows_without_time(resumed) == rows_without_time(whole)
    assert all(torch.equal(weight, resumed.best.weights[name]) for name, weight in whole.best.weights.items())
    assert whole.best.weights.keys() > LORA_NAMES


@pytest.mark.parametrize("rung", RUNGS)
def test_two_workers_change_no_loss_beyond_the_last_bits(folders, rung):
    alone = fitted(folders[rung], rung, batch_size=7)
    place, barrier = [None, None], threading.Barrier(2)

    def worker(rank):
        return fitted(folders[rung], rung, group=ThreadGroup(rank, 2, place, barrier), batch_size=7)

    with ThreadPoolExecutor(2) as threads:
        for state in threads.map(worker, range(2)):
            assert state.best.captions == alone.best.captions
            for row, expected in zip(rows_without_time(state), rows_without_time(alone), strict=True):
                assert row == pytest.approx(expected, rel=1e-4)


def test_gradient_checkpointing_changes_no_gradient(folders):
    found = []
    for is_on in (False, True):
        fit = fit_of(fresh(folders["patches"]), gradient_checkpointing=is_on)
        fit.optimizer.zero_grad = lambda **_: None
        fit.step([batch_of(fit.model, "patches")], step=9)
        found.append({name: weight.grad for name, weight in fit.trained.items()})
    torch.testing.assert_close(*found)


def test_a_bfloat16_llama_learns_float32_adapters_to_nearly_the_same_loss(folders):
    exact, coarse = (fit_of(fresh(folders["pooled"], dtype)) for dtype in ("float32", "bfloat16"))
    batch = batch_of(exact.model, "pooled")
    torch.testing.assert_close(exact.loss_sum(batch), coarse.loss_sum(batch), rtol=0.03, atol=0)
    before = coarse.weights()
    coarse.step([batch], step=10)
    assert {weight.dtype for weight in coarse.trained.values()} == {torch.float32}
    assert coarse.model.llama.dtype == torch.bfloat16
    assert all(not torch.equal(before[name], coarse.weights()[name]) for name in LORA_NAMES)
    state = fit_projector(
        coarse.model,
        toys.train_split(coarse.model),
        toys.validation(coarse.model, 2),
        config(max_steps=2, num_scored_images=2, max_caption_tokens=6),
    )
    assert len(state.best.captions) == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_a_step_of_a_patch_projector_with_lora_is_that_of_plain_transformers_and_peft(tmp_path):
    model = fresh(toys.save_model(tmp_path, kind="mlp", image_tokens=16, lora=toys.LORA))
    fit = fit_of(model, max_grad_norm=1e9)
    projector = {
        name: weight.detach().clone().requires_grad_(True) for name, weight in fit.projector.named_parameters()
    }
    fit.optimizer.zero_grad = lambda **_: None
    batch = batch_of(model, "patches", 9)
    result = fit.step([batch], step=10)

    theirs, loss = plain_step(tmp_path, model.template, batch, projector)
    assert float(result.loss_sum / result.num_tokens) == pytest.approx(loss.item(), rel=1e-6)
    assert {**projector, **theirs}.keys() == fit.trained.keys()
    for name, expected in {**projector, **theirs}.items():
        grad = expected.grad
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(fit.trained[name].grad, grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))


def plain_step(folder, template, batch, projector):
    """The adapter's weights with their gradients and the mean loss, by transformers', peft's and torch's own code."""
    clip = CLIPVisionModel.from_pretrained(folder / "clip").eval()
    lora = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    llama = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "llama").eval(), lora)
    weights = {name.replace(".default", ""): weight for name, weight in llama.named_parameters() if "lora_" in name}
    weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    with torch.no_grad():
        for name, tensor in toys.random_adapter(folder, toys.LORA).items():
            weights[name].copy_(tensor)
    settings = tiny_models.preprocessor_config()
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    with torch.no_grad():
        states = clip((batch.images / 255 - mean) / std, output_hidden_states=True).hidden_states[-2][:, 1:]
    hidden = F.gelu(F.linear(states, projector["linear_1.weight"], projector["linear_1.bias"]))
    image = F.linear(hidden, projector["linear_2.weight"], projector["linear_2.bias"])
    embed = llama.get_input_embeddings()
    before, after = (embed(torch.tensor([ids] * len(batch))) for ids in (template.prefix_ids, template.suffix_ids))
    captions = embed(batch.labels.masked_fill(batch.labels == IGNORED, 0))
    prompt = torch.cat([before, image, after], dim=1)
    labels = torch.cat([torch.full(prompt.shape[:2], IGNORED), batch.labels], dim=1)
    loss = llama(inputs_embeds=torch.cat([prompt, captions], dim=1), labels=labels).loss
    loss.backward()
    return weights, loss
