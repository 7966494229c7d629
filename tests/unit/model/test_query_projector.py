"""The projector whose queries attend to the patches, against its formula in plain torch."""

import math

import pytest
import torch
from torch.nn import functional as F

from captioner.model.projector import ProjectorConfig, build_projector
from captioner.model.projectors.query import num_heads


def built(num_tokens: int, width: int = 128):
    torch.manual_seed(3)
    return build_projector(ProjectorConfig(kind="query", num_features=width, width=24, num_image_tokens=num_tokens))


def attention_of(projector, patches):
    """float[B, heads, k, P], by loops over heads, queries and patches."""
    states, heads, side = projector.norm(patches), projector.num_heads, math.isqrt(patches.shape[1])
    keys, width = projector.key(states), patches.shape[2] // projector.num_heads
    scores = torch.empty(len(patches), heads, len(projector.query), patches.shape[1])
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for query in range(len(projector.query)):
            for patch in range(patches.shape[1]):
                y, x = (patch // side + 0.5) / side, (patch % side + 0.5) / side
                squared = (projector.y[query] - y) ** 2 + (projector.x[query] - x) ** 2
                alike = keys[:, patch, part] @ projector.query[query, part] / math.sqrt(width)
                scores[:, head, query, patch] = alike - projector.log_sharpness[query].exp() * squared
    return scores.softmax(-1)


@pytest.mark.parametrize("num_tokens", [1, 5, 8])
def test_it_is_attention_with_learned_places_and_one_linear_map(num_tokens):
    projector, patches = built(num_tokens), torch.randn(2, 16, 128)
    with torch.no_grad():
        projector.query.mul_(50)  # so that what patches hold counts as much as where they are
        values = projector.value(projector.norm(patches)).view(2, 16, 2, 64).transpose(1, 2)
        read = (attention_of(projector, patches) @ values).transpose(1, 2).reshape(2, num_tokens, 128)
        expected = F.linear(read, projector.linear.weight, projector.linear.bias)
        torch.testing.assert_close(projector(patches), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_query_begins_in_a_cell_of_its_own():
    attention = attention_of(built(8), torch.randn(3, 64, 128))
    most = attention.mean((0, 1)).argmax(-1)
    cells = {(int(patch) // 8 // 4, int(patch) % 8 // 2) for patch in most}
    assert cells == {(row, column) for row in range(2) for column in range(4)}


def test_a_learning_step_moves_where_a_query_looks():
    projector, patches = built(4), torch.randn(2, 16, 128)
    projector(patches).square().sum().backward()
    for name in ("query", "y", "x", "log_sharpness", "key.weight"):
        assert projector.get_parameter(name).grad.abs().max() > 0, name


def test_under_autocast_it_computes_in_the_lower_precision():
    projector, patches = built(4), torch.randn(2, 16, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = projector(patches)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), projector(patches), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("width", "heads"), [(48, 1), (96, 1), (768, 12), (1024, 16), (1152, 18), (1000, 10)])
def test_heads_have_64_numbers_or_more(width, heads):
    assert num_heads(width) == heads
