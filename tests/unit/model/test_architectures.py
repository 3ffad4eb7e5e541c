"""The baselines of the paper are settings of the recurrence; each equals its formula by hand."""

import dataclasses

import pytest
import torch

from hrmtext.artifacts import load_model
from hrmtext.artifacts.hf_folder import to_hf_config
from hrmtext.artifacts.upstream import to_upstream
from hrmtext.artifacts.weights import save_model
from hrmtext.batch import RowLayout
from hrmtext.config.base import build
from hrmtext.config.model import ARCHITECTURES, preset
from hrmtext.config.train import ModelChoice, TrainConfig
from hrmtext.errors import ConfigError
from hrmtext.model import Depth, KVCache, build_model, make_plan
from hrmtext.model.flops import count_parameters
from hrmtext.model.layers import rotary_tables
from hrmtext.runtime.io import atomic_folder

DEPTHS = {"hrm": 5, "transformer": 1, "ut": 2, "rins": 5, "trm": 2, "trm_match_recurrence": 5}
CALLS = {"hrm": 8, "transformer": 1, "ut": 4, "rins": 8, "trm": 4, "trm_match_recurrence": 8}
ROWS, PREFIXES = [7, 4], [3, 4]


def config_of(name):
    return preset("test", **ARCHITECTURES[name])


def batch(config):
    layout = RowLayout.from_prefixes(ROWS, PREFIXES)
    tokens = torch.arange(sum(ROWS)) % config.vocab_size
    positions = torch.cat([torch.arange(length) for length in ROWS])
    return tokens, positions, layout


def by_hand(name, model, tokens, positions, plan):
    """The formulas of the paper's section on baselines, one call a line."""
    core, config = model.model, model.config
    cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, torch.float64)
    x = core.embed_tokens(tokens) * config.scale
    z = core.z_L_init.expand_as(x)

    def call(stack, y):
        return stack(y, cos, sin, plan, 0)

    S = core.H_module
    if name == "transformer":
        return call(S, x)
    if name == "ut":
        for _ in range(4):
            z = call(S, z + x)
        return z
    if name == "rins":
        for _ in range(7):
            z = call(core.L_module, z + x)
        return call(S, z)
    L = S if name.startswith("trm") else core.L_module
    for _ in range(2):
        for _ in range(1 if name == "trm" else 3):
            z = call(L, z + x)
        x = call(S, x + z)
    return x


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_is_the_formula(name):
    config = config_of(name)
    model = build_model(config, seed=1, dtype=torch.float64)
    tokens, positions, layout = batch(config)
    plan = make_plan(layout, dtype=torch.float64)
    expected = model.lm_head(by_hand(name, model, tokens, positions, plan))
    torch.testing.assert_close(model(tokens, positions, plan).logits, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_calls_and_slots_are_counted(name):
    config = config_of(name)
    model = build_model(config, seed=0)
    assert config.num_stack_calls == CALLS[name]
    assert config.num_slots == CALLS[name] * config.num_layers_per_stack
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).stored
    stacks = {n.split(".")[1] for n, _ in model.named_parameters() if "_module" in n}
    assert stacks == ({"H_module", "L_module"} if name in ("hrm", "rins") else {"H_module"})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_published_backward_depth_reaches_the_last_calls_only(name):
    config = config_of(name)
    depth = Depth.from_bp_steps(config, DEPTHS[name])
    flags = depth.carries_gradient
    assert sum(flags) == DEPTHS[name] and len(flags) == CALLS[name]
    if name in ("transformer", "ut", "rins", "trm"):  # one H call at the end of them
        assert all(flags[-DEPTHS[name] :])
    build(
        TrainConfig,
        {"model": {"preset": "test", "architecture": name}, "bp_first": DEPTHS[name],
         "bp_last": DEPTHS[name]},
        where="test",
    )  # fmt: skip
    model = build_model(config, seed=0)
    tokens, positions, layout = batch(config)
    model(tokens, positions, make_plan(layout), depth=depth).logits.sum().backward()
    gets_gradient = model.model.embed_tokens.weight.grad is not None
    # The embedding feeds every L call of ut and rins; in trm and hrm only the first H cycle.
    assert gets_gradient == (name not in ("trm",))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_cached_token_gets_the_logits_of_a_whole_pass(name):
    config = config_of(name)
    model = build_model(config, seed=3).eval()
    row, prompt = list(range(5, 14)), 5
    whole = RowLayout.from_prefixes([len(row)], [prompt])
    expected = model(torch.tensor(row), torch.arange(len(row)), make_plan(whole)).logits
    cache = KVCache(config, 1, capacity=16)
    first = RowLayout.from_prefixes([prompt], [prompt])
    plan = cache.prefill(first, make_plan(first))
    model(torch.tensor(row[:prompt]), torch.arange(prompt), plan)
    plan.commit()
    for position in range(prompt, len(row)):
        plan = cache.decode()
        found = model(torch.tensor([row[position]]), torch.tensor([position]), plan).logits[0]
        plan.commit()
        torch.testing.assert_close(found, expected[position], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_native_form_holds_it_and_outside_forms_refuse_baselines(name, tmp_path):
    config = config_of(name)
    model = build_model(config, seed=4)
    with atomic_folder(tmp_path / "model") as folder:
        save_model(folder, config, model.state_dict())
    again = load_model(tmp_path / "model")
    assert again.config == config
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    if name == "hrm":
        to_hf_config(config)
        return
    for write in (to_hf_config, lambda c: to_upstream(c, 5, {})):
        with pytest.raises(ConfigError, match="baseline"):
            write(config)


def test_an_architecture_is_chosen_by_name_and_its_settings_may_be_changed():
    choice = build(ModelChoice, {"preset": "L", "architecture": "ut", "L_cycles": 5}, where="test")
    model = choice.resolve()
    assert (model.hidden_size, model.H_cycles, model.L_cycles, model.shared_stack) == (
        1280,
        1,
        5,
        True,
    )
    with pytest.raises(ConfigError, match="perhaps you meant 'rins'"):
        build(ModelChoice, {"architecture": "rin"}, where="test")
    with pytest.raises(ConfigError, match="L_cycles is 0"):
        preset("test", L_cycles=0)
    assert dataclasses.replace(config_of("trm"), shared_stack=False).stacks == "HL"
