"""A run can start from any model's weights, and refuses one that does not fit."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from memory_source import MemorySource, random_rows, small_config
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from hrmtext.artifacts import load_model
from hrmtext.artifacts.hf_folder import to_hf_config
from hrmtext.artifacts.weights import save_model
from hrmtext.config.base import build, to_mapping
from hrmtext.config.train import TrainConfig
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.hf import HrmTextConfig, HrmTextForCausalLM
from hrmtext.model import build_model
from hrmtext.runtime.io import atomic_folder
from hrmtext.train import train_on
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.start import load_config, start_from
from hrmtext.train.state import TrainState

sys.path.append(str(Path(__file__).parents[1] / "convert"))
from upstream_helpers import Averaging, Head, write_configs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("first") / "run"
    return train_on(
        small_config(), MemorySource(random_rows(24)), run_folder=folder, progress="none"
    )


def settings(**changes) -> TrainConfig:
    return build(TrainConfig, {**to_mapping(small_config()), **changes}, where="test")


def fresh_state(config: TrainConfig) -> TrainState:
    model = build_model(config.model.resolve(), seed=77)
    return TrainState(model=model, optimizer=AdamAtan2(model.parameters(), lr=1e-3, ema_decay=0.9))


def bare_model(trained, tmp_path, tokenizer_folder=None):
    """A model folder without training state."""
    model = load_model(trained.checkpoint, "raw")
    with atomic_folder(tmp_path / "bare") as folder:
        state = model.state_dict()
        save_model(folder, model.config, state, tokenizer_folder=tokenizer_folder)
    return tmp_path / "bare"


@pytest.mark.parametrize(("which", "taken"), [("auto", "ema"), ("ema", "ema"), ("raw", "raw")])
def test_the_weights_and_their_average_are_those_that_were_asked_for(trained, which, taken):
    config = settings(init_from=str(trained.run_folder), init_weights=which)
    state = fresh_state(config)
    line = start_from(config, state, None)
    expected = load_model(trained.checkpoint, taken).state_dict()
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert torch.equal(state.average()[name], expected[name]), name
    assert taken.lower() in line.lower() and str(trained.checkpoint) in line


def test_the_optimizer_state_comes_along_when_asked(trained):
    config = settings(init_from=str(trained.checkpoint), init_weights="raw", init_optimizer=True)
    state = fresh_state(config)
    start_from(config, state, None)
    moments = [state.optimizer.state[p] for p in state.names().values()]
    assert all(m["step"] > 0 and float(m["exp_avg_sq"].abs().sum()) > 0 for m in moments)
    for name, tensor in load_model(trained.checkpoint, "raw").state_dict().items():
        assert torch.equal(state.average()[name], tensor), name


def test_a_hugging_face_folder_serves_and_gives_its_shape(trained, tmp_path):
    model = load_model(trained.checkpoint, "ema")
    twin = HrmTextForCausalLM(HrmTextConfig(**to_hf_config(model.config)))
    twin.load_state_dict(model.state_dict())
    twin.save_pretrained(tmp_path / "hf")
    config = load_config(None, [f"init_from={tmp_path / 'hf'}", "batch_tokens=64"])
    assert config.model.resolve().hidden_size == model.config.hidden_size
    longer = load_config(None, [f"init_from={tmp_path / 'hf'}", "model.max_seq_len=777"])
    assert longer.model.max_seq_len == 777
    state = fresh_state(config)
    start_from(config, state, None)
    assert all(
        torch.equal(tensor, model.state_dict()[name])
        for name, tensor in state.model.state_dict().items()
    )


def test_a_run_that_starts_from_another_resumes_without_it(trained, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(trained.checkpoint, source)
    rows, results = random_rows(24, seed=9), []
    for name, interrupted in (("whole", False), ("parts", True)):
        config = settings(init_from=str(source), max_steps=6)
        data = MemorySource(rows)
        if interrupted:
            brief = settings(init_from=str(source), max_steps=6, max_minutes=1e-9)
            train_on(brief, data, run_folder=tmp_path / name, progress="none")
            shutil.rmtree(source)
        results.append(
            train_on(config, MemorySource(rows), run_folder=tmp_path / name, progress="none")
        )
    first, second = (load_model(result.checkpoint, "raw").state_dict() for result in results)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    begun = load_model(trained.checkpoint, "ema").state_dict()
    assert not all(torch.equal(tensor, begun[name]) for name, tensor in first.items())


def test_another_shape_is_refused_before_anything_is_written(trained, tmp_path):
    config = settings(init_from=str(trained.run_folder), model={"preset": "test", "H_cycles": 1},
                      bp_last=3)  # fmt: skip
    with pytest.raises(ConfigError, match="H_cycles is 1 here and 2 there"):
        train_on(config, MemorySource(random_rows(8)), run_folder=tmp_path / "run", progress="none")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(trained, tmp_path):
    folders = []
    for name, texts in (("a", ["to be or not to be"]), ("b", ["that is the question"])):
        PromptTokenizer(train_tokenizer(texts * 20, 290)).save(tmp_path / name)
        folders.append(tmp_path / name)
    config = settings(init_from=str(bare_model(trained, tmp_path, folders[0])))
    start_from(config, fresh_state(config), folders[0])
    with pytest.raises(ConfigError, match=r"tokenizer\.path="):
        start_from(config, fresh_state(config), folders[1])


def test_what_is_not_there_is_named(trained, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_config(None, [f"init_from={tmp_path / 'absent'}"])
    with pytest.raises(ConfigError, match="need init_from"):
        settings(init_optimizer=True)
    config = settings(init_from=str(bare_model(trained, tmp_path)), init_optimizer=True)
    with pytest.raises(ConfigError, match="holds no optimizer state"):
        start_from(config, fresh_state(config), None)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("which", ["raw", "ema"])
def test_a_checkpoint_of_the_public_training_code_serves_with_its_optimizer(tmp_path, which):
    write_configs(tmp_path)
    model = Head(seed=3)
    optimizer = Averaging(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        of = optimizer.state[parameter]
        of["step"] = torch.tensor(7.0)
        for name in ("exp_avg", "exp_avg_sq", "param_ema"):
            of[name] = torch.rand(parameter.shape, generator=generator)
    content = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(content, checkpoint_id=tmp_path / "fsdp2_epoch_1", no_dist=True)
    config = load_config(
        None, [f"init_from={tmp_path}", f"init_weights={which}", "init_optimizer=true"]
    )
    state = fresh_state(config)
    assert which.lower() in start_from(config, state, None).lower()
    theirs = {
        "lm_head.weight": model.lm_head.weight,
        "model.L_module.layers.1.attn.gqkv_proj.weight":
            model.model.L_level.core.layers[1].attn.gqkv_proj.weight,
        "model.embed_tokens.weight": model.embed_tokens.embedding_weight,
    }  # fmt: skip
    for name, parameter in theirs.items():
        expected = parameter if which == "raw" else optimizer.state[parameter]["param_ema"]
        ours = state.names()[name]
        assert torch.equal(ours, expected) and torch.equal(state.average()[name], expected), name
        moments = state.optimizer.state[ours]
        assert moments["step"] == 7
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[moment], optimizer.state[parameter][moment]), name
