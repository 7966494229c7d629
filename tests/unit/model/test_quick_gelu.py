"""The quicker activation computes what transformers' does: on a CPU to the last bit, on a GPU at least as exactly."""

import copy

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import QuickGELUActivation

from captioner.model.bundle import load
from captioner.model.quick_gelu import QuickGeluMlp, fuse_quick_gelu
from tests.unit.model.test_model_oracle import save_linear_bundle
from tests.unit.model.tiny_models import clip_config

EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random_tower(**changes):
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**clip_config().vision_config.to_dict() | changes))
    for name, parameter in tower.named_parameters():
        if "mlp" in name:  # far from 0, where the activation bends
            parameter.data.normal_(std=0.3)
    return tower.eval().requires_grad_(False)


def as_on_a_gpu(tower):
    for module in fuse_quick_gelu(tower).modules():
        if isinstance(module, QuickGeluMlp):
            module.forward = module.in_one_pass
    return tower


def states(tower, dtype):
    size = tower.config.image_size
    images = torch.randn(50, 3, size, size, generator=torch.Generator().manual_seed(1))
    return tower.to(dtype)(pixel_values=images.to(dtype)).last_hidden_state.double()


@EACH_DTYPE
def test_on_a_cpu_the_states_are_those_of_transformers(dtype):
    tower = random_tower()
    expected = states(copy.deepcopy(tower), dtype)
    assert torch.equal(states(fuse_quick_gelu(tower), dtype), expected)


def test_on_a_gpu_the_states_are_those_of_transformers():
    tower = random_tower().double()
    exact = states(copy.deepcopy(tower), torch.float64)
    torch.testing.assert_close(states(as_on_a_gpu(tower), torch.float64), exact, rtol=1e-12, atol=1e-12)


@EACH_DTYPE
def test_on_a_gpu_the_error_is_no_larger_than_that_of_transformers(dtype):
    tower = random_tower()
    exact = states(copy.deepcopy(tower), torch.float64)
    theirs = (states(copy.deepcopy(tower), dtype) - exact).norm()
    ours = (states(as_on_a_gpu(tower.to(dtype)), dtype) - exact).norm()
    assert 0 < ours < 1.1 * theirs


@pytest.mark.gpu
def test_a_gpu_uses_the_version_in_one_pass():
    tower = fuse_quick_gelu(random_tower().cuda().bfloat16())
    images = torch.randn(8, 3, tower.config.image_size, tower.config.image_size).cuda().bfloat16()
    found = tower(pixel_values=images).last_hidden_state
    assert torch.equal(as_on_a_gpu(tower)(pixel_values=images).last_hidden_state, found)


def test_parameters_keep_their_names_and_other_activations_stay():
    tower = random_tower()
    names = set(tower.state_dict())
    assert set(fuse_quick_gelu(tower).state_dict()) == names
    other = random_tower(hidden_act="gelu")
    kinds = [type(module) for module in other.modules()]
    assert [type(module) for module in fuse_quick_gelu(other).modules()] == kinds


def test_a_loaded_model_has_the_faster_activation(tmp_path):
    model = load(str(save_linear_bundle(tmp_path)), device="cpu")
    assert model.vision_tower.config.hidden_act == "quick_gelu"
    assert not any(isinstance(module, QuickGELUActivation) for module in model.vision_tower.modules())
