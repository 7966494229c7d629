"""Drawn tokens follow transformers' warped softmax and depend on nothing but their own seed and step."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from captioner.config import DecodingConfig
from captioner.decoding import sampling
from captioner.decoding.sampling import candidate_seed, sample, top_candidates, uniform

NUM_DRAWS = 20_000


def warped_softmax(logits: torch.Tensor, options: dict[str, float]) -> torch.Tensor:
    """What transformers' `generate` would draw from, in its own order of warpers."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.get("temperature", 1.0))])
    if options.get("top_k"):
        warpers.append(TopKLogitsWarper(int(options["top_k"])))
    if options.get("top_p", 1.0) < 1:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if options.get("min_p"):
        warpers.append(MinPLogitsWarper(options["min_p"]))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1)


def chi_square_per_degree(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic over its degrees of freedom, rare tokens taken together; about 1 if the counts fit."""
    expected = probabilities.double() * counts.sum()
    is_common = expected >= 10
    pairs = [(counts[is_common].double(), expected[is_common])]
    if (~is_common).any() and expected[~is_common].sum() > 1:
        pairs.append((counts[~is_common].sum()[None].double(), expected[~is_common].sum()[None]))
    observed, wanted = (torch.cat(side) for side in zip(*pairs, strict=True))
    return float(((observed - wanted) ** 2 / wanted).sum() / max(len(wanted) - 1, 1))


@pytest.mark.parametrize("vocabulary", [50, 1003])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 0, "temperature": 0.6},
        {"top_k": 20},
        {"top_k": 20, "top_p": 0.8, "temperature": 1.3},
        {"top_k": 0, "top_p": 0.9},
        {"top_k": 0, "top_p": 0.5, "min_p": 0.05},
        {"top_k": 0, "min_p": 0.1, "temperature": 2.0},
        {"top_k": 30, "top_p": 0.95, "min_p": 0.02},
    ],
)
def test_draws_follow_the_warped_softmax_of_transformers(options, vocabulary):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5)) * 2
    wanted = warped_softmax(logits, options)
    decoding = DecodingConfig(do_sample=True, **options)
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for seeds in torch.arange(NUM_DRAWS).split(5000):
        rows = logits.expand(len(seeds), -1)
        token_ids, is_exact = sample(rows, uniform(seeds, torch.zeros_like(seeds)), decoding, looks_at_all=True)
        assert is_exact.all()
        counts += torch.bincount(token_ids, minlength=vocabulary)
    assert counts[wanted == 0].sum() == 0, "a token that was cut was drawn"
    degrees = max(int((wanted * NUM_DRAWS >= 10).sum()) - 1, 1)
    assert chi_square_per_degree(counts, wanted) < 1 + 5 * math.sqrt(2 / degrees)


def test_few_candidates_draw_what_the_whole_vocabulary_would_or_say_that_they_cannot():
    logits = torch.randn(64, 20_000, generator=torch.Generator().manual_seed(6)) * torch.linspace(0.5, 6, 64)[:, None]
    uniforms = uniform(torch.arange(64), torch.zeros(64, dtype=torch.long))
    decoding = DecodingConfig(do_sample=True, top_k=0, top_p=0.9)
    few, is_exact = sample(logits, uniforms, decoding)
    everything, _ = sample(logits, uniforms, decoding, looks_at_all=True)
    assert is_exact.any()
    assert not is_exact.all()
    assert torch.equal(few[is_exact], everything[is_exact])


@pytest.mark.parametrize("vocabulary", [40, 1000, 4001])
@pytest.mark.parametrize("k", [1, 8, 50])
def test_the_top_candidates_are_those_of_a_full_topk(vocabulary, k):
    scores = torch.randn(33, vocabulary, generator=torch.Generator().manual_seed(7))
    k = min(k, vocabulary)
    values, token_ids = top_candidates(scores, k)
    expected = torch.topk(scores, k)
    assert torch.equal(values, expected.values)
    assert torch.equal(token_ids, expected.indices)


def test_uniforms_are_uniform_over_seeds_and_over_steps():
    for seeds, steps in ((torch.arange(100_000), torch.tensor(3)), (torch.tensor(3), torch.arange(100_000))):
        numbers = uniform(seeds, steps)
        assert ((numbers > 0) & (numbers < 1)).all()
        counts = torch.histc(numbers, 100, 0, 1)
        assert chi_square_per_degree(counts, torch.full((100,), 0.01)) < 1.6


def test_a_uniform_depends_on_its_own_seed_and_step_only():
    seeds = torch.tensor([5, -(2**63), 2**63 - 1, 0])
    steps = torch.tensor([0, 1, 2, 3])
    alone = [uniform(seeds[i : i + 1], steps[i : i + 1]) for i in range(4)]
    assert torch.equal(uniform(seeds, steps), torch.cat(alone))
    assert len(set(uniform(seeds, steps).tolist())) == 4


def test_the_first_candidate_of_an_image_has_the_image_s_own_seed():
    assert [candidate_seed(seed, 0) for seed in (0, 7, -5, 2**63 - 1, -(2**63))] == [0, 7, -5, 2**63 - 1, -(2**63)]
    assert len({candidate_seed(7, n) for n in range(100)}) == 100


def test_a_uniform_next_to_one_draws_a_token_with_mass():
    logits = torch.full((1, sampling._CHUNK * 4), -math.inf)
    logits[0, [1, 40]] = 0.0
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    drawn, _ = sample(logits, last, DecodingConfig(do_sample=True, top_k=0))
    assert drawn.item() == 40
