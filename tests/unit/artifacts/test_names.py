"""The table of tensor names, in both directions."""

import pytest

from hrmtext.artifacts.names import FORMATS, outside_names, place_of, tensor_names, tensor_shapes
from hrmtext.config import PRESETS, preset
from hrmtext.model import empty_model


@pytest.mark.parametrize("name", list(PRESETS))
def test_names_and_shapes_are_those_of_the_model(name):
    state = empty_model(preset(name), device="meta").state_dict()
    assert tensor_names(preset(name)) == list(state)
    assert tensor_shapes(preset(name)) == {n: tuple(t.shape) for n, t in state.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_every_name_comes_back_and_none_is_given_twice(form):
    config = preset("test", num_layers_per_stack=3)
    seen = []
    for name in tensor_names(config):
        parts = outside_names(name, form, 3)
        for index, part in enumerate(parts):
            place = place_of(part, form, 3)
            assert (place.name, place.index, place.num_parts) == (name, index, len(parts))
        seen += parts
    assert len(seen) == len(set(seen))


def test_names_are_the_published_ones():
    matrix = "model.L_module.layers.7.attn.gqkv_proj.weight"
    assert outside_names(matrix, "split")[1] == "model.L_module.layers.7.self_attn.q_proj.weight"
    assert outside_names(matrix, "upstream") == (
        "model.L_level.core.layers.7.attn.gqkv_proj.weight",
    )
    assert outside_names(matrix, "gguf", 16)[0] == "blk.7.attn_gate.weight"
    high = matrix.replace("L_module", "H_module")
    assert outside_names(high, "gguf", 16)[3] == "blk.23.attn_v.weight"
    assert outside_names("model.z_L_init", "upstream") == ("model.zL_init",)


@pytest.mark.parametrize("form", FORMATS)
def test_unknown_names_have_no_place(form):
    for name in ("lm_head.bias", "model.H_module.layers.0.attn.weight", "blk.0.attn_norm.weight"):
        assert place_of(name, form, 2) is None
