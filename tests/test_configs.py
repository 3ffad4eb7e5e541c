"""Every recipe under configs/ parses, resolves, and builds its model without memory."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from hrmtext.cli.main import main
from hrmtext.config.ablate import AblationConfig
from hrmtext.config.base import build, load, read_yaml, to_mapping
from hrmtext.config.data import DataConfig
from hrmtext.config.model import ARCHITECTURES, PRESETS, ModelConfig, preset
from hrmtext.config.train import AttentionName, TrainConfig
from hrmtext.data.sources.recipe.catalog import RECIPE
from hrmtext.errors import ConfigError
from hrmtext.model import empty_model
from hrmtext.model.attention.api import BACKENDS
from hrmtext.model.flops import count_parameters
from hrmtext.train.estimate import Fleet, estimate
from hrmtext.train.start import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}


def kind_of(path: Path) -> type:
    parts = path.relative_to(CONFIGS).parts
    return AblationConfig if parts[:2] == ("train", "ablate") else KINDS[parts[0]]


def recipes() -> list[Path]:
    return sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", recipes(), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_recipe_parses_and_comes_back_equal(path):
    kind = kind_of(path)
    config = load(kind, path)
    assert build(kind, to_mapping(config), where="again") == config


def rule_of(config: DataConfig, stratum: str) -> tuple[int | None, int]:
    for rule in config.sampling.rules:
        if stratum.startswith(rule.prefix):
            return rule.max_rows, rule.repeat
    return None, 1


def test_the_published_mixture_names_every_source_with_its_cap_and_repeat():
    config = load(DataConfig, CONFIGS / "data" / "paper.yaml")
    assert [source.source for source in config.hub] == [source.name for source in RECIPE]
    for source in RECIPE:
        name = source.name if source.stratum is None else f"{source.name}__x"
        assert rule_of(config, name) == (source.max_rows, source.repeat), source.name
    assert rule_of(config, "flan__cot_fsopt_data__gsm8k") == (None, 1)
    assert rule_of(config, "flan__niv2_fsopt_data__task1") == (5_000, 1)
    for source, entry in zip(RECIPE, config.hub, strict=True):
        assert (entry.path is not None) == (source.hub is None), source.name
    assert (config.sampling.epochs, config.sampling.max_seq_len) == (4, 4_096)


def test_the_mini_mixture_reads_a_little_of_every_source():
    config = load(DataConfig, CONFIGS / "data" / "mini.yaml")
    assert [source.source for source in config.hub] == [source.name for source in RECIPE]
    assert all(source.limit is not None for source in config.hub)
    for source in RECIPE:
        assert rule_of(config, f"{source.name}__x") == (None, source.repeat), source.name


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_training_recipe_builds_its_model_on_meta(path):
    config = load(TrainConfig, path).model.resolve()
    model = empty_model(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).stored


@pytest.mark.parametrize("path", recipes(), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_a_recipe_with_a_misspelt_key_is_refused_with_its_nearest_match(path):
    kind = kind_of(path)
    values = read_yaml(path)
    key = next(iter(values))
    values[key + "x"] = values.pop(key)
    with pytest.raises(ConfigError, match=f"perhaps you meant '{key}'"):
        build(kind, values, where=path.name)


GPUS = {"1gpu": 1, "l_8xh100": 8, "xl_16xh100": 16}


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_training_recipe_dry_runs_with_cost_memory_and_time(path):
    fleet = Fleet(count=GPUS.get(path.stem, 1))
    found = estimate(
        load(TrainConfig, path), device=torch.device("cpu"), fleet=fleet, epoch_tokens=15e9
    )
    assert found.stored_parameters > 0 and found.total_flops > 0 and found.seconds > 0
    text = found.text()
    assert "assumed: 38% of the device's bf16 peak, not measured" in text and "time:" in text
    if path.stem in GPUS:
        assert found.memory.total < 80e9, "a recipe must fit the GPU that it is for"
        assert found.total_tokens == pytest.approx(60e9, rel=0.01)
    if fleet.count > 1:
        assert found.sharded_memory.total < found.memory.total
        assert f"devices:       {fleet.count} x H100" in text and "if sharded" in text


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_every_architecture_builds_and_dry_runs(name):
    steps = 1 if name == "transformer" else 2
    changes = [f"model.architecture={name}", f"bp_first={steps}", f"bp_last={steps}"]
    config = load(TrainConfig, CONFIGS / "train" / "cpu_smoke.yaml", changes)
    model = empty_model(config.model.resolve(), device="meta")
    found = estimate(config, device=torch.device("cpu"))
    assert found.stored_parameters == sum(p.numel() for p in model.parameters())


def test_gpus_that_nothing_is_known_of_are_refused():
    with pytest.raises(ConfigError, match="gpus is 0"):
        Fleet(count=0)
    with pytest.raises(ConfigError, match="nothing is known about the GPU 'H10'; perhaps"):
        Fleet(count=1, gpu="H10")


@pytest.mark.parametrize(
    ("file", "words"),
    [("train/ablate/paper.yaml", "hrm-text ablate"), ("data/quickstart.yaml", "data prepare")],
)
def test_a_file_for_another_verb_says_which(file, words):
    with pytest.raises(ConfigError, match=words):
        load_config(CONFIGS / file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs --data FOLDER and --run FOLDER"),
        (["--data", "D"], "needs --run FOLDER"),
        (["--gpus", "4"], "--gpus belongs to --dry-run"),
        (["--dry-run", "--gpus", "4", "--measure"], "leave out --measure"),
    ],
)
def test_wrong_options_of_train_say_what_to_do(arguments, words, capsys):
    assert main(["train", str(CONFIGS / "train" / "cpu_smoke.yaml"), *arguments]) == 2
    assert words in capsys.readouterr().err


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
        ("model=XL", "perhaps model.preset=XL"),
        ("model=3", "model"),
        ("betas=[0.9", r"'\[0.9' is no value"),
        ("bin_tokens=300", "expected a multiple of bin_tokens=300"),
        ("attention=spda", "attention: Input should be 'auto', 'reference', 'sdpa'"),
        ("optimizer_kernel=fast", "optimizer_kernel: Input should be 'auto', 'foreach'"),
        ("loss=chunk", "loss: Input should be 'auto', 'chunked'"),
        ("parallel=dp", "parallel: Input should be 'auto', 'none', 'ddp'"),
        ("compile=perhaps", "compile"),
        ("trackers=[wandbb]", "trackers.0: Input should be 'wandb'"),
        ("model.architecture=hrn", "model.architecture: unknown 'hrn'; perhaps you meant 'hrm'"),
        ("elastic.H_cycle=[1]", "unknown key 'elastic.H_cycle'; perhaps you meant 'H_cycles'"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, CONFIGS / "train" / "cpu_smoke.yaml", [override])


def test_a_recipe_names_the_attention_backends_that_there_are():
    assert {*get_args(AttentionName)} == {"auto", *BACKENDS}


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
