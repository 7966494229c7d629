"""LLaMA's layers with few kernels against transformers' own, and a card's kernels against the plain operations."""

import copy

import pytest
import torch

from captioner.config import DecodingConfig
from captioner.decoding.attention import SlotView
from captioner.decoding.fused_llama import FusedLlama
from captioner.decoding.operations import PlainOperations, operations_for
from tests.unit.decoding_models import captions, random_prefixes, tiny_llama, token_ids

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


@pytest.mark.parametrize("prefix_len", [1, 4])
@pytest.mark.parametrize("changes", LLAMAS.values(), ids=list(LLAMAS))
def test_fused_layers_write_the_captions_of_transformers_layers(changes, prefix_len):
    llama = tiny_llama(**changes)
    for parameter in llama.parameters():  # biases and norms that say nothing would hide a wrong place
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.25)
    images = random_prefixes(llama, 40, prefix_len)
    for strategy in STRATEGIES:
        decoding = DecodingConfig(max_new_tokens=12, **strategy)
        theirs = token_ids(captions(llama, images, decoding))
        ours = token_ids(captions(llama, images, decoding, layers=fused(copy.deepcopy(llama))))
        assert sum(mine != other for mine, other in zip(ours, theirs, strict=True)) <= 1


def test_weights_laid_side_by_side_stay_those_of_the_model_and_are_laid_once():
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


def test_gradients_still_pass_through_weights_that_an_engine_laid_side_by_side():
    llama = tiny_llama().requires_grad_(False)
    with torch.inference_mode():
        fused(llama)
    embeds = random_prefixes(llama, 1, 5)[0][None].requires_grad_()
    llama(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0


def test_weights_that_were_made_in_inference_mode_are_laid_too():
    prompt = torch.arange(12)[None]
    with torch.inference_mode():
        llama = tiny_llama()
        before = llama(prompt).logits
        fused(llama)
        assert torch.equal(llama(prompt).logits, before)
    attention = llama.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.k_proj.weight.untyped_storage().data_ptr()


def test_weights_that_moved_away_are_laid_anew():
    llama = tiny_llama()
    fused(llama)
    for parameter in llama.parameters():
        parameter.data = parameter.data.clone() * 2
    attention = llama.model.layers[0].self_attn
    product = fused(llama)._layers[0][1]
    assert torch.equal(product.weight[: len(attention.q_proj.weight)], attention.q_proj.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv", "width"), [(32, 8, 128), (8, 8, 64), (6, 2, 24)])
def test_a_cards_kernels_compute_the_plain_operations(dtype, num_heads, num_kv, width):
    torch.manual_seed(0)
    ours, plain = operations_for(torch.device("cuda")), PlainOperations()
    assert type(ours) is not PlainOperations
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    rows, decode, slots, num_columns, model = 37, 30, 33, 80, 200

    def draw(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    def assert_near(found, expected):
        assert (found.float() - expected.float()).norm() <= tolerance * expected.float().norm()

    hidden, residual, weight = draw(rows, model), draw(rows, model), draw(model)
    for added in (hidden, None):
        sums = [residual.clone(), residual.clone()]
        normed = [one.add_norm(added, total, weight, 1e-5) for one, total in zip((ours, plain), sums, strict=True)]
        assert_near(*normed)
        assert_near(*sums)
    gate_and_up = draw(rows, 2 * 2500)
    assert_near(ours.silu_mul(gate_and_up), plain.silu_mul(gate_and_up))
    columns = torch.randint(0, num_columns, (decode,), device="cuda")
    qkv, cos, sin = draw(rows, num_heads + 2 * num_kv, width), draw(rows, width), draw(rows, width)
    cache = draw(2, slots, num_kv, num_columns, width)
    after = [(qkv.clone(), cache.clone()), (qkv.clone(), cache.clone())]
    for one, (turned, kv) in zip((ours, plain), after, strict=True):
        one.rotate_into_slots(turned, cos, sin, kv[0], kv[1], columns)
    assert_near(after[0][0], after[1][0])
    assert_near(after[0][1], after[1][1])
    turned, kv = after[1]
    mask = torch.where(torch.arange(num_columns, device="cuda") <= columns[:, None], 0.0, -torch.inf).to(dtype)
    queries = turned[:decode, :num_heads]
    view = SlotView(kv, torch.arange(decode, device="cuda"), columns, mask[:, None, None])
    read = [one.attend(queries, kv[0], kv[1], view, width**-0.5) for one in (ours, plain)]
    assert_near(*read)
