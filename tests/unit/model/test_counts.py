"""Parameters, operations and bytes against numbers computed by hand and against torch's counter."""

import pytest
import torch
from model_helpers import model_in, run
from torch.utils.flop_counter import FlopCounterMode

from hrmtext.config import PRESETS, preset
from hrmtext.errors import ConfigError
from hrmtext.model import Depth, empty_model
from hrmtext.model.flops import (
    attention_flops,
    count_parameters,
    decode_bytes,
    forward_flops,
    kv_bytes_per_token,
    training_flops,
)

# By hand: attention 5 * 1536^2, SwiGLU 3 * 1536 * 4096, 16 layers in each of two stacks.
XL_STACK = 16 * (5 * 1536 * 1536 + 3 * 1536 * 4096)
XL_TABLE = 65_536 * 1_536


def test_parameters_at_XL_are_those_computed_by_hand():
    counts = count_parameters(preset("XL"))
    assert counts.stack == XL_STACK == 490_733_568
    assert 2 * counts.stack == 981_467_136
    assert counts.embedding == counts.head == XL_TABLE
    assert counts.stored == 1_182_793_728
    assert counts.unfolded == 8 * XL_STACK + 2 * XL_TABLE


def test_operations_at_XL_are_those_computed_by_hand():
    config = preset("XL")
    assert forward_flops(config, head_share=0.0) == 7_851_737_088
    assert forward_flops(config) - forward_flops(config, head_share=0.0) == 201_326_592
    step = training_flops(config, Depth.from_bp_steps(config, 5))
    assert step == 7_851_737_088 + 20 * XL_STACK + 6 * XL_TABLE
    assert round(step / 1e9, 2) == 18.27


def test_cache_and_decode_bytes_at_XL_are_those_computed_by_hand():
    config = preset("XL")
    assert (config.num_slots, config.mlp_size) == (128, 4_096)
    assert kv_bytes_per_token(config, 2) == 786_432
    assert 4_096 * kv_bytes_per_token(config, 2) == 3 * 2**30
    assert decode_bytes(config, 2, 10) == 2 * (8 * XL_STACK + XL_TABLE) + 10 * 786_432


@pytest.mark.parametrize("name", list(PRESETS))
def test_counted_parameters_are_those_of_the_module(name):
    config = preset(name)
    module = empty_model(config, device="meta")
    assert count_parameters(config).stored == sum(p.numel() for p in module.parameters())


def test_published_sizes_have_their_published_shapes():
    shapes = {"B": (6, 1024, 8), "L": (12, 1280, 10), "XL": (16, 1536, 12)}
    shapes |= {"XXL": (36, 1792, 14), "XXL_wide": (16, 2560, 20)}
    for name, shape in shapes.items():
        config = preset(name)
        assert (config.num_layers_per_stack, config.hidden_size, config.num_heads) == shape
        assert (config.head_dim, config.vocab_size, config.max_seq_len) == (128, 65_536, 4_096)
        assert (config.H_cycles, config.L_cycles) == (2, 3)
    assert round(count_parameters(preset("L")).stored / 1e9, 2) == 0.69
    assert round(preset("XL").scale, 2) == 39.19
    with pytest.raises(ConfigError, match="perhaps you meant 'XXL_wide'"):
        preset("XL_wide")


def test_operations_equal_torchs_own_count():
    model = model_in(torch.float32)
    rows, config = [list(range(24))], model.config
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(model, rows, [24], backend="reference")
    assert counter.get_total_flops() == 24 * forward_flops(config, context_tokens=24)
    assert attention_flops(config, 24) == 4 * 24 * config.attention_size * config.num_slots


@pytest.mark.parametrize("bp_steps", [3, 5, 8])
def test_training_operations_equal_torchs_own_count(bp_steps):
    model = model_in(torch.float32)
    depth = Depth.from_bp_steps(model.config, bp_steps)
    with FlopCounterMode(display=False) as counter:
        logits = run(model, [list(range(24))], [24], backend="reference", depth=depth).logits
        logits.sum().backward()
    counted = 24 * training_flops(model.config, depth, context_tokens=24)
    # A call whose input needs no gradient saves one product of its first projection.
    saved = 24 * 2 * model.config.hidden_size * 4 * model.config.attention_size
    assert counted - saved <= counter.get_total_flops() <= counted
