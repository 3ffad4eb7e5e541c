"""config.json and tensor names, both ways, and what is refused."""

import json

import pytest
import torch
from convert_helpers import PROMPTS, small_tokenizer, tiny
from safetensors.torch import save_file
from transformers import HrmTextConfig, HrmTextForCausalLM

from hrmtext.artifacts.hf_folder import (
    from_hf_config,
    gradient_routing,
    is_hf_folder,
    to_fused,
    to_hf_config,
    to_split,
)
from hrmtext.artifacts.opening import open_stored
from hrmtext.config import PRESETS, preset
from hrmtext.data.tokenizer import export_tokenizer
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.generate import load
from hrmtext.model import empty_model

RELEASED = {
    "model_type": "hrm_text",
    "vocab_size": 65_536,
    "hidden_size": 1_536,
    "intermediate_size": 4_096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "head_dim": 128,
    "H_cycles": 2,
    "L_cycles": 3,
    "L_bp_steps": [2],
    "max_position_embeddings": 4_096,
    "rope_theta": 10_000.0,
    "embedding_scale": 39.191_835_884_530_846,
}


def same_shape(config, other):
    """Equal but for how the SwiGLU width and the embedding scale are stated."""
    stated = {"intermediate_size": config.mlp_size, "embedding_scale": config.scale}
    assert config.with_changes(**stated) == other.with_changes(
        intermediate_size=other.mlp_size, embedding_scale=other.scale, expansion=config.expansion
    )


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_survives_the_way_there_and_back(name):
    config = preset(name, rope_theta=12_345.0, prefix_lm=False)
    same_shape(config, from_hf_config(to_hf_config(config), "test"))


def test_what_transformers_saves_again_reads_the_same(tmp_path):
    config = preset("test", L_cycles=2)
    HrmTextConfig(**to_hf_config(config)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["num_hidden_layers"], saved["num_layers_per_stack"]) == (12, 2)
    same_shape(config, from_hf_config(saved, "test"))


def test_layers_without_a_stack_count_are_those_of_one_stack():
    same_shape(preset("XL"), from_hf_config(RELEASED, "test"))
    both = {**RELEASED, "num_hidden_layers": 128, "num_layers_per_stack": 16}
    same_shape(preset("XL"), from_hf_config(both, "test"))
    with pytest.raises(CheckpointError, match="128 slots, but num_hidden_layers says 16"):
        from_hf_config({**RELEASED, "num_layers_per_stack": 16}, "test")


def test_left_out_keys_mean_what_they_mean_to_transformers():
    theirs = HrmTextConfig()
    ours = from_hf_config({"model_type": "hrm_text"}, "test")
    assert ours.vocab_size == theirs.vocab_size
    assert ours.num_layers_per_stack == theirs.num_layers_per_stack
    assert ours.num_slots == theirs.num_hidden_layers
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.scale == theirs.embedding_scale == pytest.approx(50.0)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.mlp_size, ours.head_dim) == (theirs.intermediate_size, theirs.head_dim)


def test_the_rotary_base_is_read_from_either_key():
    for stated in (
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None},
    ):
        values = {k: v for k, v in RELEASED.items() if k != "rope_theta"} | stated
        assert from_hf_config(values, "test").rope_theta == 5e5


def test_gradient_routing_is_read_from_either_key():
    assert gradient_routing(RELEASED) == [2]
    assert gradient_routing({"L_bp_cycles": [1, 3]}) == [1, 3]
    assert gradient_routing({"L_bp_steps": 2}) == [2]
    assert gradient_routing({}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rotary type 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        from_hf_config({**RELEASED, **change}, "test")


def test_a_shape_that_transformers_refuses_is_not_exported():
    with pytest.raises(ConfigError, match="no multiple of num_heads"):
        to_hf_config(preset("test", num_heads=3))


def test_split_names_are_exactly_transformers_own():
    config = preset("test")
    model = empty_model(config, device="cpu")
    twin = HrmTextForCausalLM(HrmTextConfig(**to_hf_config(config)))
    split = to_split(model.state_dict())
    theirs = {name: tuple(t.shape) for name, t in twin.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in split.items()} == theirs


def test_splitting_and_fusing_are_inverse_and_parts_are_in_order():
    state = tiny().model.state_dict()
    split = to_split(state)
    again = to_fused(split)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor)
        assert torch.equal(to_fused(state)[name], tensor)
    layer = "model.H_module.layers.1."
    fused = state[layer + "attn.gqkv_proj.weight"]
    for index, part in enumerate(("gate", "q", "k", "v")):
        rows = fused[32 * index : 32 * (index + 1)]
        assert torch.equal(split[f"{layer}self_attn.{part}_proj.weight"], rows)
    assert torch.equal(
        split[layer + "mlp.gate_proj.weight"], state[layer + "mlp.gate_up_proj.weight"][:64]
    )


def test_a_fused_matrix_with_a_missing_part_is_refused():
    split = to_split(tiny().model.state_dict())
    del split["model.L_module.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"lacks its part model\.L.*self_attn\.k_proj\.weight"
    ):
        to_fused(split)


def write_folder(folder, model, tensors, shards=1):
    """A Hugging Face folder as others write it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(model.config)))
    export_tokenizer(small_tokenizer(), folder, 128)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_form_of_a_folder_loads_to_the_same_model(tmp_path, split, shards):
    model = tiny()
    state = model.model.state_dict()
    folder = write_folder(tmp_path / "m", model, to_split(state) if split else state, shards)
    loaded = load(folder)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert loaded.generate(PROMPTS, max_new_tokens=6) == model.generate(PROMPTS, max_new_tokens=6)


def test_what_transformers_saves_loads_here(tmp_path):
    model = tiny()
    twin = HrmTextForCausalLM(HrmTextConfig(**to_hf_config(model.config)))
    twin.load_state_dict(to_split(model.model.state_dict()))
    twin.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    for name, tensor in open_stored(tmp_path).load_model(dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name])


def test_damaged_folders_are_refused_with_the_reason(tmp_path):
    model = tiny()
    state = dict(model.model.state_dict())
    folder = write_folder(tmp_path / "whole", model, state)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="neither"):
        load(folder)

    del state["lm_head.weight"]
    state["lm_head.bias"] = torch.zeros(384)
    state["model.embed_tokens.weight"] = torch.zeros(100, 32)
    folder = write_folder(tmp_path / "names", model, state)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for part in ("missing lm_head.weight", "unexpected lm_head.bias", "shape (100, 32)"):
        assert part in str(caught.value)

    folder = write_folder(tmp_path / "shards", model, model.model.state_dict(), shards=2)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.extra"] = next(iter(values["weight_map"].values()))
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="no shard holds"):
        open_stored(folder)
    values["weight_map"] = {"lm_head.weight": "../outside.safetensors"}
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_stored(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        open_stored(folder)

    (folder / "config.json").write_text("[1]")
    assert not is_hf_folder(folder)
