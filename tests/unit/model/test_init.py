"""Initial weights: statistics, and sameness."""

import math

import pytest
import torch

from hrmtext.config import preset
from hrmtext.model import build_model, empty_model, init_weights
from hrmtext.model.init import CUT_STD

WIDE = {
    "vocab_size": 1_024, "hidden_size": 192, "num_heads": 4, "head_dim": 32,
    "intermediate_size": 320, "num_layers_per_stack": 1,
}  # fmt: skip


def expected_std(name):
    if name.endswith("z_L_init"):
        return 1.0
    if name.endswith("o_proj.weight"):
        return 1 / math.sqrt(4 * 32)
    if name.endswith("down_proj.weight"):
        return 1 / math.sqrt(320)
    return 1 / math.sqrt(192)


def test_every_tensor_has_its_std_and_is_cut_at_three_sigma():
    model = build_model(preset("test", **WIDE), seed=3)
    for name, weight in model.state_dict().items():
        std, count = expected_std(name), weight.numel()
        assert abs(float(weight.std()) / std - 1) < 4 / math.sqrt(2 * count) + 1e-3, name
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(count), name
        limit = 3 * std / CUT_STD
        assert float(weight.abs().max()) <= limit * (1 + 1e-6), name
        assert count < 10_000 or float(weight.abs().max()) > 0.95 * limit, name


def test_the_std_of_the_cut_normal_is_the_integral():
    x = torch.linspace(-3, 3, 200_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    std = math.sqrt(float((x.square() * density).sum() / density.sum()))
    assert abs(CUT_STD - std) < 1e-6


def test_weights_depend_on_seed_and_name_alone():
    config = preset("test")
    first, again, other = (build_model(config, seed=s).state_dict() for s in (1, 1, 2))
    torch.rand(17)
    later = empty_model(config, device="cpu")
    init_weights(later, 1)
    deeper = build_model(preset("test", num_layers_per_stack=3), seed=1).state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, later.state_dict()[name])
        assert torch.equal(weight, deeper[name])
        assert not torch.equal(weight, other[name])
    assert not torch.equal(
        first["model.H_module.layers.0.mlp.down_proj.weight"],
        first["model.L_module.layers.0.mlp.down_proj.weight"],
    )


def test_the_start_of_z_L_is_saved_but_not_trained():
    model = build_model(preset("test"), seed=0)
    assert "model.z_L_init" in model.state_dict()
    assert "model.z_L_init" not in dict(model.named_parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_weights_are_the_same_on_the_gpu():
    config = preset("test")
    there = build_model(config, seed=1, device="cuda").state_dict()
    for name, weight in build_model(config, seed=1).state_dict().items():
        assert torch.equal(weight, there[name].cpu())
