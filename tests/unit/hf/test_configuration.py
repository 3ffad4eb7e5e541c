"""The config: transformers' fields, defaults and derived values, both ways; wrong ones refused."""

from __future__ import annotations

import json

import pytest
import transformers
from hf_cases import small_config, small_model

from hrmtext.hf import HrmTextConfig, HrmTextForCausalLM

FLASH = (
    "flash_attention_2", "flash_attention_3", "flash_attention_4", "paged|flash_attention_2",
    "kernels-community/flash-attn3", "kernels-community/vllm-flash-attn3", "paged|sdpa",
)  # fmt: skip


def test_defaults_and_derived_values_are_those_of_transformers():
    ours, theirs = HrmTextConfig(), transformers.HrmTextConfig()
    assert ours.to_dict() == theirs.to_dict()
    assert (ours.num_layers_per_stack, ours.num_hidden_layers) == (16, 128)
    assert ours.embedding_scale == 50.0 and ours.L_bp_cycles == [2] and ours.prefix_lm


def test_configs_round_trip_with_transformers_in_both_directions(tmp_path):
    ours = small_config(embedding_scale=7.5, prefix_lm=False, rope_theta=5e5)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(theirs) is transformers.HrmTextConfig
    theirs.save_pretrained(tmp_path / "theirs")
    again = HrmTextConfig.from_pretrained(tmp_path / "theirs")
    assert again.to_dict() == ours.to_dict()
    assert again.num_layers_per_stack == 2 and again.num_hidden_layers == 12
    assert again.to_model_config() == ours.to_model_config()


def test_old_spellings_are_read(tmp_path):
    values = {
        "model_type": "hrm_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 16, "L_bp_steps": 3,
        "rope_theta": 20_000.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = HrmTextConfig.from_pretrained(tmp_path)
    assert config.num_layers_per_stack == 3 and config.num_hidden_layers == 24
    assert config.L_bp_cycles == [3]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 20_000.0}
    assert config.to_model_config().rope_theta == 20_000.0


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_refused_under_prefix_lm_everywhere(name):
    with pytest.raises(ValueError, match="PrefixLM"):
        small_config(attn_implementation=name)
    config = small_config()
    with pytest.raises(ValueError, match="PrefixLM"):
        config._attn_implementation = name
    model = small_model()
    with pytest.raises(ValueError, match="PrefixLM"):
        model.set_attn_implementation(name)
    with pytest.raises(ValueError, match="PrefixLM"):
        HrmTextForCausalLM._from_config(small_config(), attn_implementation=name)
    assert model.config._attn_implementation == "sdpa"


def test_flash_attention_is_not_refused_for_a_causal_model():
    config = small_config(prefix_lm=False)
    config._attn_implementation = "flash_attention_2"
    assert config._attn_implementation == "flash_attention_2"
    # Without a GPU it fails later, for transformers' own reasons.
    with pytest.raises((ImportError, ValueError, RuntimeError)) as caught:
        small_model(prefix_lm=False).set_attn_implementation("flash_attention_2")
    assert "PrefixLM" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"head_dim": 15}, "head_dim"),
    ],
)
def test_options_that_the_model_does_not_have_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(**changes)
