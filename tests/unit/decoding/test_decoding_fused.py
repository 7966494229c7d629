"""Fused layers against transformers' own, and the Triton kernels against the plain operations."""

import copy
from dataclasses import replace

import pytest
import torch

from captioner.config import DecodingConfig
from captioner.decoding.cuda.fused_llama import FusedLlama
from captioner.decoding.cuda.operations import PlainOperations, operations_for
from captioner.decoding.cuda.unfused_llama import UnfusedLlama
from captioner.decoding.stores import Stores
from captioner.decoding.view import StepView
from tests.unit.decoding.decoding_models import captions, random_prefixes, tiny_llama, token_ids

LLAMAS = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "no groups": {"num_key_value_heads": 8},
    "llama 3.1's rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "wide heads": {"head_dim": 24},
}
STRATEGIES = [{}, {"do_sample": True, "num_captions": 2}, {"num_beams": 3}]


def fused(llama):
    return FusedLlama(llama, PlainOperations())


@pytest.mark.parametrize("prefix_len", [1, 4, 90])
@pytest.mark.parametrize("changes", LLAMAS.values(), ids=list(LLAMAS))
def test_fused_layers_write_the_captions_of_transformers_layers(changes, prefix_len):
    llama = tiny_llama(**changes)
    for parameter in llama.parameters():  # biases of 0 and norms of 1 would hide a wrong place
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.25)
    images = random_prefixes(llama, 16 if prefix_len < 90 else 8, prefix_len)
    layers = fused(copy.deepcopy(llama))
    for strategy in STRATEGIES:
        decoding = DecodingConfig(max_new_tokens=12, **strategy)
        theirs = token_ids(captions(llama, images, decoding, slots=24))
        ours = token_ids(captions(llama, images, decoding, slots=24, layers=layers))
        assert sum(mine != other for mine, other in zip(ours, theirs, strict=True)) <= 1


@pytest.mark.parametrize("prefix_len", [1, 4, 90])
def test_layers_that_cannot_be_joined_write_the_same_captions_on_a_card(prefix_len):
    llama = tiny_llama()
    images = random_prefixes(llama, 8, prefix_len)
    decoding = DecodingConfig(max_new_tokens=12)
    layers = UnfusedLlama(llama, PlainOperations())
    assert token_ids(captions(llama, images, decoding, layers=layers)) == token_ids(captions(llama, images, decoding))


def test_joined_weights_stay_those_of_the_model_and_are_joined_once():
    llama = tiny_llama()
    prompt = torch.arange(12)[None]
    before = llama(prompt).logits
    size = sum(parameter.nbytes for parameter in llama.parameters())
    with torch.inference_mode():
        fused(llama)
        places = [parameter.data_ptr() for parameter in llama.parameters()]
        fused(llama)
    assert [parameter.data_ptr() for parameter in llama.parameters()] == places
    assert torch.equal(llama(prompt).logits, before)
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in llama.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == size


def test_gradients_still_pass_through_weights_that_an_engine_joined():
    llama = tiny_llama().requires_grad_(False)
    with torch.inference_mode():
        fused(llama)
    embeds = random_prefixes(llama, 1, 5)[0][None].requires_grad_()
    llama(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0


def test_weights_that_were_made_in_inference_mode_are_joined_too():
    prompt = torch.arange(12)[None]
    with torch.inference_mode():
        llama = tiny_llama()
        before = llama(prompt).logits
        fused(llama)
        assert torch.equal(llama(prompt).logits, before)
    attention = llama.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.k_proj.weight.untyped_storage().data_ptr()


def test_weights_that_were_replaced_are_joined_again():
    llama = tiny_llama()
    fused(llama)
    for parameter in llama.parameters():
        parameter.data = parameter.data.clone() * 2
    attention = llama.model.layers[0].self_attn
    expected = attention.q_proj.weight.clone()
    fused(llama)
    assert torch.equal(attention.q_proj.weight, expected)
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.k_proj.weight.untyped_storage().data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv", "width"), [(32, 8, 128), (8, 8, 64), (6, 2, 24)])
def test_triton_kernels_compute_the_plain_operations(dtype, num_heads, num_kv, width):
    torch.manual_seed(0)
    ours, plain = operations_for(torch.device("cuda")), PlainOperations()
    assert type(ours) is not PlainOperations
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    decode, tiles, width_of_model = 29, 4, 200
    rows = decode + 16 * tiles

    def draw(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    def assert_near(found, expected):
        assert (found.float() - expected.float()).norm() <= tolerance * expected.float().norm()

    hidden, residual, weight = draw(rows, width_of_model), draw(rows, width_of_model), draw(width_of_model)
    for added in (hidden, None):
        sums = [residual.clone(), residual.clone()]
        normed = [one.add_norm(added, total, weight, 1e-5) for one, total in zip((ours, plain), sums, strict=True)]
        assert_near(*normed)
        assert_near(*sums)
    gate_and_up = draw(rows, 2 * 2500)
    assert_near(ours.silu_mul(gate_and_up), plain.silu_mul(gate_and_up))
    for has_prefixes in (True, False):
        view = view_of(draw, num_kv, width, decode, tiles, has_prefixes=has_prefixes)
        qkv, cos, sin = draw(rows, num_heads + 2 * num_kv, width), draw(rows, width), draw(rows, width)
        views = [view, replace(view, stores=copy.deepcopy(view.stores))]
        turned = [qkv.clone(), qkv.clone()]
        for one, each, rotated in zip((ours, plain), views, turned, strict=True):
            one.rotate_into_stores(rotated, cos, sin, each, 1)
        assert_near(*turned)
        assert_near(views[0].stores.own[:, :, :-1], views[1].stores.own[:, :, :-1])  # but the spare slot
        if has_prefixes:
            assert_near(*(each.stores.prefixes[..., :-1, :] for each in views))  # but the spare column
        queries = turned[1][:, :num_heads]
        assert_near(*(one.attend(queries, views[1], 1, width**-0.5) for one in (ours, plain)))


def view_of(draw, num_kv: int, width: int, decode: int, tiles: int, *, has_prefixes: bool) -> StepView:
    """A step of two layers: captions at many columns, and tiles that continue an image or follow it, the last idle."""
    most, own_columns, places = 100, 64, 5
    slots = 32
    lengths = torch.randint(20, most - 40, (slots + 1,), device="cuda") * has_prefixes
    lengths[-1] = 0
    prefix_of = torch.randint(0, places, (slots + 1,), device="cuda")
    prefix_of[[1, 5, 7]] = torch.tensor([0, 1, 2], device="cuda")
    lengths[1] = 60 * has_prefixes
    stores = Stores(
        draw(2, 2, places if has_prefixes else 0, num_kv, most if has_prefixes else 0, width),
        draw(2, 2, slots + 1, num_kv, own_columns, width),
        prefix_of,
        lengths,
    )
    own = torch.randint(0, own_columns, (decode,), device="cuda")
    slots_of = torch.tensor([1, 5, 7, slots], device="cuda").repeat_interleave(16)[: 16 * tiles]
    firsts = torch.stack([lengths[1] * 0 + 16, lengths[5], lengths[7], lengths[-1]])
    prompt_columns = (firsts[:, None] + torch.arange(16, device="cuda")).flatten()
    idle = torch.arange(16 * tiles, device="cuda") >= 16 * tiles - 19
    others = torch.where(slots_of == slots, slots, slots_of + 10 * (prompt_columns >= lengths[slots_of]))
    lengths[[15, 17, 11]] = lengths[[5, 7, 1]]
    prefix_of[[15, 17, 11]] = prefix_of[[5, 7, 1]]
    both = torch.stack([slots_of, others], 1).masked_fill(idle[:, None], slots)
    columns = torch.cat([own + lengths[:decode], prompt_columns.masked_fill(idle, 0)])
    return StepView(
        stores=stores, num_rows=decode, own_columns=own, columns=columns, window=own_columns, targets=both, plan=None
    )
