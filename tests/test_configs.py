"""Every recipe under configs/ parses, resolves, and builds its model without memory."""

from pathlib import Path

import pytest

from hrmtext.config.ablate import AblationConfig
from hrmtext.config.base import build, load, read_yaml, to_mapping
from hrmtext.config.data import DataConfig
from hrmtext.config.model import PRESETS, ModelConfig, preset
from hrmtext.config.train import TrainConfig
from hrmtext.errors import ConfigError
from hrmtext.model import empty_model
from hrmtext.model.flops import count_parameters

CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = {
    "ablate": AblationConfig, "data": DataConfig, "model": ModelConfig, "train": TrainConfig,
}  # fmt: skip


def recipes() -> list[Path]:
    return sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", recipes(), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_recipe_parses_and_comes_back_equal(path):
    kind = KINDS[path.relative_to(CONFIGS).parts[0]]
    config = load(kind, path)
    assert build(kind, to_mapping(config), where="again") == config


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").rglob("*.yaml")), ids=lambda p: p.stem)
def test_a_training_recipe_builds_its_model_on_meta(path):
    config = load(TrainConfig, path).model.resolve()
    model = empty_model(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).stored


@pytest.mark.parametrize("path", recipes(), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_recipe_with_a_misspelt_key_is_refused_with_its_nearest_match(path):
    kind = KINDS[path.relative_to(CONFIGS).parts[0]]
    values = read_yaml(path)
    key = next(iter(values))
    values[key + "x"] = values.pop(key)
    with pytest.raises(ConfigError, match=f"perhaps you meant '{key}'"):
        build(kind, values, where=path.name)


def test_published_sizes_have_their_published_parameters():
    published = {"L": 0.69e9, "XL": 1.183e9}
    for name, expected in published.items():
        assert count_parameters(PRESETS[name]).stored == pytest.approx(expected, rel=0.01)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="perhaps you meant 'XXL_wide'"):
        preset("XXL_wid")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "not of the form key=value"),
        ("model.hiden_size=3", "perhaps you meant 'hidden_size'"),
        ("seed=abc", "seed: Input should be a valid integer"),
        ("lr=-1", "lr is -1.0, expected above 0"),
        ("model.head_dim=7", "even number"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, CONFIGS / "train" / "cpu_smoke.yaml", [override])


def test_an_override_reaches_a_nested_key_and_is_parsed_as_yaml():
    path = CONFIGS / "train" / "cpu_smoke.yaml"
    config = load(TrainConfig, path, ["model.H_cycles=1", "betas=[0.8, 0.9]", "bp_last=2"])
    assert (config.model.H_cycles, config.betas) == (1, (0.8, 0.9))


@pytest.mark.parametrize("text", ["- a list\n", "key: [unclosed\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(TrainConfig, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(TrainConfig, tmp_path / "absent.yaml")


def test_prompts_bear_loss_in_causal_models_only():
    path = CONFIGS / "train" / "cpu_smoke.yaml"
    with pytest.raises(ConfigError, match="prefix_lm: false"):
        load(TrainConfig, path, ["objective=all"])
    assert load(TrainConfig, path, ["objective=all", "model.prefix_lm=false"]).objective == "all"
