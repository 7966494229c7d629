"""Fitting a projector: what learns, what it is fed, and that a fit is the same however it is shared or cut."""

import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from captioner.config import DecodingConfig
from captioner.errors import JobError, OutputError
from captioner.training.fit.batches import IGNORED, TokenizedSplit, epoch_batches, share
from captioner.training.fit.fit_loop import Listener, fit_projector
from captioner.training.fit.fit_state import FitState
from captioner.training.fit.projector import ProjectorFit, end_token_id, learning_rate
from captioner.training.fit.schedule import Schedule, steps_per_epoch
from captioner.training.fit.validation import Evaluation, Validation
from captioner.training.fit.worker_group import WorkerGroup
from tests.unit.training import fitting_models as toys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder):
    return toys.fresh(folder)


def fit_of(model, **changes):
    return ProjectorFit(model, toys.config(**changes), num_steps=20, group=WorkerGroup())


def gradient_of_step(fit, batches):
    """The gradient that a step follows: AdamW would make large steps of its smallest differences."""
    fit.optimizer.zero_grad = lambda **_: None
    fit.step(batches, step=10)
    return fit.projector.weight.grad


# What learns, and what it is fed


def test_only_the_projector_has_a_gradient(model):
    fit = fit_of(model)
    examples = toys.train_split(model)
    fit.loss_sum(examples.batch(np.arange(6))).backward()
    modules = {"clip": model.vision_tower, "projector": fit.projector, "llama": model.llama}
    named = {f"{part}.{name}": weight for part, module in modules.items() for name, weight in module.named_parameters()}
    assert {name for name, weight in named.items() if weight.grad is not None} == {"projector.weight", "projector.bias"}
    assert {name for name, weight in named.items() if weight.requires_grad} == {"projector.weight", "projector.bias"}


def test_a_step_changes_the_projector_and_nothing_else(model):
    frozen = {name: weight.clone() for name, weight in model.llama.state_dict().items()}
    fit, examples = fit_of(model), toys.train_split(model)
    before = fit.weights()
    fit.step([examples.batch(np.arange(6))], step=10)
    assert all(not torch.equal(before[name], weight) for name, weight in fit.weights().items())
    assert all(torch.equal(frozen[name], weight) for name, weight in model.llama.state_dict().items())


def test_llama_is_fed_what_captioning_feeds_it(model):
    fed = []
    fit, examples = fit_of(model), toys.train_split(model)
    batch = examples.batch(np.arange(6))
    model.llama.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: fed.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    fit.loss_sum(batch)
    image_embeds = fit.model.projector(batch.images.float())
    request = fit.model.request_embeddings(image_embeds)
    prompt = fit.model.prompt_embeddings().expand(len(request), -1, -1)
    assert request.shape[1] == 2 + len(model.template.suffix_ids)
    assert torch.equal(fed[0][:, : model.num_prompt_tokens], torch.cat([prompt, request], dim=1))


def test_the_loss_is_that_of_transformers_with_labels_behind_the_prompt_alone(model):
    fit, examples = fit_of(model), toys.train_split(model)
    batch = examples.batch(np.arange(9))
    request = fit.model.request_embeddings(fit.embed(batch.images))
    prompt = fit.model.prompt_embeddings().expand(len(request), -1, -1)
    last = batch.labels.masked_fill(batch.labels == IGNORED, 0)
    embeds = torch.cat([prompt, request, model.llama.get_input_embeddings()(last)], dim=1)
    labels = torch.cat([torch.full((len(last), model.num_prompt_tokens), IGNORED), batch.labels], dim=1)
    mean = model.llama(inputs_embeds=embeds, labels=labels).loss
    torch.testing.assert_close(fit.loss_sum(batch), mean * (batch.labels != IGNORED).sum())


def test_padding_changes_no_loss(model):
    fit, examples = fit_of(model), toys.train_split(model)
    together = fit.loss_sum(examples.batch(np.arange(12)))
    alone = sum(fit.loss_sum(examples.batch(np.array([row]))) for row in range(12))
    torch.testing.assert_close(together, alone)


def test_every_caption_ends_with_the_end_token_and_one_that_is_cut_does_not(model):
    whole, cut = (toys.split(model, 20, seed=1, max_tokens=most) for most in (64, 5))
    end = end_token_id(model.tokenizer, model.template.text, model.eos_token_ids)
    assert set(whole.tokens[whole.starts[1:] - 1]) == {end}
    assert cut.lengths.max() == 5
    is_cut = whole.lengths > 5
    assert is_cut.any()
    assert end not in cut.tokens[cut.starts[1:][is_cut] - 1]


def test_a_template_of_turns_teaches_the_end_of_a_turn(tmp_path):
    template = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>{image}<|eot_id|>"
    model = toys.fresh(toys.save_model(tmp_path, template=template))
    assert (
        model.tokenizer.convert_ids_to_tokens(end_token_id(model.tokenizer, model.template.text, model.eos_token_ids))
        == "<|eot_id|>"
    )


@pytest.mark.parametrize("kind", ["linear", "pooled_mlp"])
def test_every_kind_of_projector_learns(tmp_path, kind):
    model = toys.fresh(toys.save_model(tmp_path, kind=kind, image_tokens=3))
    examples = toys.train_split(model)
    state = fit_projector(model, examples, None, toys.config(epochs=6))
    losses = [row["loss"] for row in state.history]
    assert losses[-1] < 0.8 * losses[0]


def test_gradient_checkpointing_computes_layers_twice_and_changes_no_gradient(folder):
    found, num_calls = [], []
    for is_on in (False, True):
        model = toys.fresh(folder)
        calls = []
        model.llama.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        fit = fit_of(model, gradient_checkpointing=is_on)
        found.append(gradient_of_step(fit, [toys.train_split(model).batch(np.arange(6))]))
        num_calls.append(len(calls))
        assert not model.llama.training
    assert num_calls == [1, 2]
    torch.testing.assert_close(*found)


def test_a_bfloat16_llama_fits_float32_weights_to_nearly_the_same_loss(folder):
    exact, coarse = (fit_of(toys.fresh(folder, dtype)) for dtype in ("float32", "bfloat16"))
    batch = toys.train_split(exact.model).batch(np.arange(8))
    losses = [fit.loss_sum(batch) for fit in (exact, coarse)]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.03, atol=0)
    coarse.step([batch], step=10)
    assert {weight.dtype for weight in coarse.projector.parameters()} == {torch.float32}


# The order


def test_an_epoch_shows_every_example_once_in_whole_batches_of_similar_length():
    lengths = np.random.default_rng(0).integers(2, 40, 1000)
    batches = epoch_batches(lengths, 10, seed=3, epoch=1)
    assert {len(batch) for batch in batches} == {10}
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 3
    firsts = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.3


def test_the_order_follows_from_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(2, 40, 200)

    def order(**place):
        return np.concatenate(epoch_batches(lengths, 10, **place)).tolist()

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_examples_left_over_by_whole_batches_are_others_in_each_epoch():
    lengths = np.full(19, 5)
    left = [set(range(19)) - set(np.concatenate(epoch_batches(lengths, 10, seed=0, epoch=e))) for e in range(8)]
    assert {len(rows) for rows in left} == {9}
    assert set().union(*left) == set(range(19))


def test_one_caption_of_each_image_is_drawn_in_each_epoch():
    image = np.repeat(np.arange(40), 3)
    lengths = np.random.default_rng(0).integers(2, 40, len(image))
    epochs = [np.concatenate(epoch_batches(lengths, 10, seed=0, epoch=epoch, image=image)) for epoch in range(30)]
    assert all(sorted(image[rows]) == list(range(40)) for rows in epochs)
    assert set(np.concatenate(epochs)) == set(range(120))
    again = np.concatenate(epoch_batches(lengths, 10, seed=0, epoch=7, image=image))
    assert again.tolist() == epochs[7].tolist()


def test_a_fit_on_one_caption_an_image_has_fewer_steps_and_resumes_to_the_same_weights(folder):
    def fitted(saved=None, **changes):
        model, states = toys.fresh(folder), []
        settings = toys.config(captions_per_epoch="one", checkpoint_every=1, **changes)
        on_checkpoint = lambda state, fit: states.append(state.to_bytes(fit))  # noqa: E731
        state = fit_projector(
            model, toys.train_split(model), None, settings, saved=saved, listener=Listener(on_checkpoint=on_checkpoint)
        )
        return state, states

    whole, states = fitted()
    assert whole.step == 2 * (toys.NUM_TRAIN // 8)
    resumed, _ = fitted(states[2])
    assert all(torch.equal(weight, resumed.best.weights[name]) for name, weight in whole.best.weights.items())


def test_fewer_examples_than_a_batch_are_one_batch():
    assert steps_per_epoch(3, 10) == 1
    assert sorted(epoch_batches(np.full(3, 5), 10, seed=0, epoch=0)[0]) == [0, 1, 2]


def test_the_shares_of_a_step_are_disjoint_and_complete():
    rows = np.arange(23)
    for size in (1, 2, 5, 40):
        parts = [part for rank in range(size) for part in share(rows, rank=rank, size=size, num_parts=3)]
        assert sorted(np.concatenate(parts)) == list(range(23))
        assert all(len(part) for part in parts)


def test_the_learning_rate_rises_evenly_and_falls_along_a_cosine():
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, num_steps=24) for step in range(24)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[14] == pytest.approx(1.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_steps_follow_the_schedule_and_the_gradient_is_cut_to_its_limit(model):
    fit, examples = fit_of(model, learning_rate=0.4, warmup_steps=2, max_grad_norm=1e-3), toys.train_split(model)
    fit.optimizer.zero_grad = lambda **_: None
    rates = []
    for step in (0, 1, 11, 19):
        before = fit.step([examples.batch(np.arange(6))], step=step).grad_norm
        rates.append({group["lr"] for group in fit.optimizer.param_groups})
        after = torch.cat([weight.grad.flatten() for weight in fit.projector.parameters()]).norm()
        assert before > 1e-2
        assert float(after) == pytest.approx(1e-3, rel=1e-3)
    expected = [learning_rate(step, peak=0.4, warmup_steps=2, num_steps=20) for step in (0, 1, 11, 19)]
    assert rates == [{rate} for rate in expected]
    assert expected[:3] == pytest.approx([0.2, 0.4, 0.2])


def test_weight_decay_shrinks_matrices_and_no_bias(model):
    fit = fit_of(model, weight_decay=0.5, learning_rate=0.1, warmup_steps=0)
    fit.projector.bias.data.fill_(1.0)
    before = fit.weights()
    for weight in fit.projector.parameters():
        weight.grad = torch.zeros_like(weight)
    fit.optimizer.step()
    after = fit.weights()
    assert torch.equal(after["bias"], before["bias"])
    torch.testing.assert_close(after["weight"], before["weight"] * (1 - 0.1 * 0.5))


# However it is shared


class ThreadGroup(WorkerGroup):
    """Workers of a group as threads of this process."""

    def __init__(self, rank, size, place, barrier):
        super().__init__(rank, size)
        object.__setattr__(self, "place", place)
        object.__setattr__(self, "barrier", barrier)

    def _all(self, mine):
        self.place[self.rank] = mine
        self.barrier.wait(60)
        found = [self.place[rank] for rank in range(self.size)]
        self.barrier.wait(60)
        return found

    def sum(self, tensor):
        found = self._all(tensor.clone())
        tensor.copy_(torch.stack(found).sum(0))
        return tensor

    def gather(self, part):
        return [item for part in self._all(part) for item in part]


def fit_by(size, folder, config, num_scored=4):
    place, barrier = [None] * size, threading.Barrier(size)

    def worker(rank):
        model = toys.fresh(folder)
        group = ThreadGroup(rank, size, place, barrier)
        return fit_projector(model, toys.train_split(model), toys.validation(model, num_scored), config, group=group)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(worker, range(size)))


def rows_without_time(state):
    return [{k: v for k, v in row.items() if not k.endswith(("_per_s", "seconds"))} for row in state.history]


SHARED = toys.config(batch_size=7, num_scored_images=4, max_caption_tokens=8, eval_every=11)


@pytest.fixture(scope="module")
def alone(folder):
    """The last state of one worker's fit in whole batches."""
    return fit_by(1, folder, SHARED)[0]


@pytest.mark.parametrize(("size", "num_parts"), [(1, 3), (2, 1), (3, 2)])
def test_workers_and_parts_change_no_loss_beyond_the_last_bits(folder, alone, size, num_parts):
    shared = fit_by(size, folder, replace(SHARED, gradient_accumulation_steps=num_parts))
    assert len(alone.history) > 4
    for state in shared:
        assert state.best.captions == alone.best.captions
        for row, expected in zip(rows_without_time(state), rows_without_time(alone), strict=True):
            assert row == pytest.approx(expected, rel=2e-5)


def test_more_workers_than_examples_in_a_step_change_nothing(folder):
    config = toys.config(batch_size=2, max_steps=5)
    [alone] = fit_by(1, folder, config, num_scored=0)
    for state in fit_by(3, folder, config, num_scored=0):
        assert rows_without_time(state)[-1] == pytest.approx(rows_without_time(alone)[-1], rel=2e-5)


def test_a_worker_with_few_tokens_weighs_no_more_than_they_do(folder):
    model = toys.fresh(folder)
    examples = toys.train_split(model)
    order = np.argsort(examples.lengths)
    short, long = order[:3], order[-3:]
    fit, alone = fit_of(model, max_grad_norm=1e9), fit_of(toys.fresh(folder))
    assert examples.lengths[long].min() > 2 * examples.lengths[short].max()
    in_parts = gradient_of_step(fit, [examples.batch(short), examples.batch(long)])
    whole = examples.batch(np.concatenate([short, long]))
    (alone.loss_sum(whole) / len(whole.loss_positions)).backward()
    torch.testing.assert_close(in_parts, alone.projector.weight.grad, rtol=1e-4, atol=1e-7)


# Wherever it is cut


@pytest.mark.parametrize("checkpoint_after_s", [180.0, 0.0], ids=["by steps", "by time"])
def test_a_fit_that_is_interrupted_at_any_checkpoint_ends_with_the_same_bits(folder, checkpoint_after_s):
    config = toys.config(eval_every=11, checkpoint_every=4, num_scored_images=3, max_caption_tokens=6)

    def fit(saved=None, listener=None):
        model = toys.fresh(folder)
        return fit_projector(
            model,
            toys.train_split(model),
            toys.validation(model, 3),
            config,
            saved=saved,
            listener=listener,
            checkpoint_after_s=checkpoint_after_s,
        )

    weights = {}
    listener = Listener(on_checkpoint=lambda state, fit: weights.update({state.step: fit.weights()}))
    unbroken = fit(listener=listener)
    *steps, last = sorted(weights)
    assert len(steps) > 3
    expected = weights.pop(last)
    resumed = toys.interrupted(fit, steps, listener)
    assert all(torch.equal(expected[name], weight) for name, weight in weights[last].items())
    assert rows_without_time(resumed) == rows_without_time(unbroken)
    assert resumed.best.step == unbroken.best.step
    assert torch.equal(resumed.best.weights["weight"], unbroken.best.weights["weight"])


def checkpoints_of(folder, *, min_interval=250, checkpoint_after_s=180.0, **changes):
    """Steps from which a fit can resume, and its last state."""
    model, steps = toys.fresh(folder), []
    listener = Listener(on_checkpoint=lambda state, _fit: steps.append(state.step))
    options = {"listener": listener, "min_interval": min_interval, "checkpoint_after_s": checkpoint_after_s}
    return steps, fit_projector(model, toys.train_split(model), None, toys.config(**changes), **options)


def test_a_long_fit_of_one_epoch_is_evaluated_and_kept_twenty_times(folder):
    model = toys.fresh(folder)
    num_examples = len(toys.train_split(model))
    assert num_examples > 40
    steps, state = checkpoints_of(folder, min_interval=1, batch_size=1, epochs=1, log_every=1000)
    every = num_examples // 20
    assert steps == sorted({*range(every, num_examples + 1, every), num_examples})
    assert [row["step"] for row in state.history] == steps
    assert checkpoints_of(folder, min_interval=1, max_steps=3)[0] == [1, 2, 3]


@pytest.mark.parametrize(
    ("num_steps", "evaluations"), [(156, [156]), (600, [250, 500, 600]), (20_000, range(1000, 20_001, 1000))]
)
def test_a_short_fit_does_not_spend_its_time_on_evaluations(num_steps, evaluations):
    schedule = Schedule(toys.config(), steps_per_epoch=num_steps, num_steps=num_steps)
    assert [step for step in range(1, num_steps + 1) if schedule.has_evaluation(step)] == list(evaluations)


def test_a_fit_of_many_epochs_is_evaluated_once_in_each():
    schedule = Schedule(toys.config(), steps_per_epoch=4, num_steps=200)
    evaluations = [step for step in range(1, 201) if schedule.has_evaluation(step)]
    assert evaluations == list(range(4, 201, 4)) == [step for step in range(1, 201) if schedule.has_checkpoint(step)]


def test_a_checkpoint_is_due_after_some_minutes_and_adds_no_row(folder):
    rare = {"eval_every": 10, "checkpoint_every": 10, "max_steps": 10, "log_every": 3}
    assert checkpoints_of(folder, **rare)[0] == [10]
    expected = checkpoints_of(folder, **rare)[1]
    steps, state = checkpoints_of(folder, checkpoint_after_s=0.0, **rare)
    assert steps == [3, 6, 9, 10]
    assert rows_without_time(state) == rows_without_time(expected)


def test_a_checkpoint_of_other_examples_is_refused_with_what_to_do(folder):
    model, kept = toys.fresh(folder), []
    listener = Listener(on_checkpoint=lambda state, fit: kept.append(state.to_bytes(fit)))
    options = {"config": toys.config(max_steps=2, checkpoint_every=1), "validation": None}
    fit_projector(model, toys.train_split(model), examples="a" * 32, listener=listener, **options)
    assert fit_projector(model, toys.train_split(model), examples="a" * 32, saved=kept[0], **options).step == 2
    with pytest.raises(OutputError, match=r"step 1 is of other examples \(aaaaaaaaaaaa\) .* remove _run/checkpoint.pt"):
        fit_projector(model, toys.train_split(model), examples="b" * 32, saved=kept[0], **options)


def test_a_damaged_checkpoint_is_named_as_such(model):
    data = FitState().to_bytes(fit_of(model))
    with pytest.raises(JobError, match="checkpoint is damaged"):
        FitState.from_bytes(data[: len(data) // 2], fit_of(model))


def test_no_pickle_in_a_checkpoint_is_run(model, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    buffer = io.BytesIO()
    torch.save({"weights": Evil()}, buffer)
    with pytest.raises(JobError, match="checkpoint is damaged"):
        FitState.from_bytes(buffer.getvalue(), fit_of(model))
    assert not (tmp_path / "ran").exists()


# Evaluation


class ScriptedValidation(Validation):
    """Evaluations with these figures, one after another."""

    def __init__(self, *figures):
        object.__setattr__(self, "figures", iter(figures))

    def measure(self, fit):
        return Evaluation(next(self.figures), [])


def test_the_best_weights_are_kept_and_the_fit_ends_early(folder):
    losses = [3.0, 2.0, 2.5, 2.2, 1.0, 0.5]
    model = toys.fresh(folder)
    seen = []
    config = toys.config(eval_every=2, checkpoint_every=2, max_steps=12, early_stop=2)
    listener = Listener(on_checkpoint=lambda state, fit: seen.append((state.step, fit.weights()["weight"])))
    validation = ScriptedValidation(*({"val_loss": loss} for loss in losses))
    state = fit_projector(model, toys.train_split(model), validation, config, listener=listener)
    assert (state.step, state.is_stopped, state.best.step) == (8, True, 4)
    assert torch.equal(state.best.weights["weight"], dict(seen)[4])
    assert seen[-1][0] == 8


def test_the_best_may_be_chosen_by_cider(folder):
    model = toys.fresh(folder)
    config = toys.config(eval_every=2, max_steps=6, keep_best_by="cider", num_scored_images=1)
    validation = ScriptedValidation(*({"val_loss": 1.0, "cider_d": cider} for cider in (0.5, 0.9, 0.1)))
    assert fit_projector(model, toys.train_split(model), validation, config).best.step == 4


def test_validation_captions_are_those_of_the_model_itself(folder):
    model = toys.fresh(folder)
    fit = fit_of(model, max_caption_tokens=7)
    validation = toys.validation(model, 5)
    found = validation.measure(fit)
    image_embeds = fit.embed(torch.from_numpy(validation.examples.images[:5]))
    expected = fit.model.generate(image_embeds.detach(), DecodingConfig(max_new_tokens=7))
    assert found.captions == [model.text(caption.token_ids) for caption in expected]
    assert set(found.figures) == {"val_loss", "bleu_4", "rouge_l", "cider_d"}


def test_the_validation_loss_is_the_mean_over_its_tokens(folder):
    model = toys.fresh(folder)
    fit, validation = fit_of(model), toys.validation(model)
    batch = validation.examples.batch(np.arange(len(validation.examples)))
    expected = fit.loss_sum(batch).item() / int((batch.labels != IGNORED).sum())
    assert validation.measure(fit).figures["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_fit_that_diverges_says_so(folder):
    model = toys.fresh(folder)
    examples = toys.train_split(model)
    broken = replace(examples, images=np.full_like(examples.images, math.inf))
    with pytest.raises(JobError, match=r"diverged\. Lower --learning-rate"):
        fit_projector(model, broken, None, toys.config())


def test_a_fit_without_validation_images_keeps_the_last_weights(folder):
    model = toys.fresh(folder)
    state = fit_projector(model, toys.train_split(model), None, toys.config(max_steps=5))
    assert (state.best.step, state.best.figures) == (5, {})


def test_spaces_of_a_caption_are_one_space_each(model):
    options = {"end_token_id": 1, "max_tokens": 64}
    odd, plain = (
        TokenizedSplit.tokenize(toys.features(1, seed=0), [[text]], model.tokenizer, **options)
        for text in ("  a\n red \t square ", "a red square")
    )
    assert odd.tokens.tolist() == plain.tokens.tolist()
