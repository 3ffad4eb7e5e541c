"""Native model folders: what is written comes back, and nothing damaged is read as whole."""

import pytest
import torch

from hrmtext.artifacts import load_model, load_state, read_config, save_model
from hrmtext.artifacts.weights import CONFIG_FILE, EMA_FILE, WEIGHTS_FILE
from hrmtext.config import preset
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.model import build_model
from hrmtext.runtime.io import MARKER, atomic_folder

CONFIG = preset("test")


@pytest.fixture
def model():
    return build_model(CONFIG, seed=3)


@pytest.fixture
def folder(tmp_path, model):
    path = tmp_path / "model"
    ema = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    with atomic_folder(path) as temporary:
        save_model(temporary, CONFIG, model.state_dict(), ema=ema)
    return path


def test_config_and_weights_come_back_bit_for_bit(folder, model):
    assert read_config(folder) == CONFIG
    loaded = load_model(folder, "raw")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training


def test_auto_takes_the_ema_where_there_is_one(folder, model, tmp_path):
    embedding = model.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(load_state(folder)["model.embed_tokens.weight"], embedding * 0.5)
    bare = tmp_path / "bare"
    with atomic_folder(bare) as temporary:
        save_model(temporary, CONFIG, model.state_dict())
    assert torch.equal(load_state(bare)["model.embed_tokens.weight"], embedding)
    with pytest.raises(CheckpointError, match=EMA_FILE):
        load_state(bare, "ema")
    with pytest.raises(ConfigError, match="auto, raw, ema"):
        load_state(bare, "newest")


def test_ema_is_stored_in_fp32_and_weights_in_their_own_format(tmp_path):
    model = build_model(CONFIG, seed=1, dtype=torch.bfloat16)
    path = tmp_path / "half"
    with atomic_folder(path) as temporary:
        save_model(temporary, CONFIG, model.state_dict(), ema=model.state_dict())
    assert {t.dtype for t in load_state(path, "ema").values()} == {torch.float32}
    assert {t.dtype for t in load_state(path, "raw").values()} == {torch.bfloat16}
    assert next(load_model(path, "raw", dtype=torch.float64).parameters()).dtype == torch.float64


def test_a_folder_without_its_marker_is_refused(folder):
    (folder / MARKER).unlink()
    with pytest.raises(CheckpointError, match="not written to its end"):
        load_model(folder)


def test_a_truncated_weights_file_is_refused(folder):
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"expected .* bytes"):
        load_state(folder, "raw")


def test_a_damaged_header_of_the_right_size_is_refused(folder):
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(b"\xff" * 64 + whole[64:])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_state(folder, "raw")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("lm_head.weight"), "missing lm_head.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda state: state.update({"lm_head.weight": torch.zeros(3, 4)}),
            r"lm_head.weight has shape \(3, 4\), the model's is \(64, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_left(tmp_path, model, change, message):
    state = dict(model.state_dict())
    change(state)
    path = tmp_path / "wrong"
    with pytest.raises(CheckpointError, match=message), atomic_folder(path) as temporary:
        save_model(temporary, CONFIG, state)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_shape_of_model_are_refused(folder):
    text = (folder / CONFIG_FILE).read_text()
    changed = text.replace("vocab_size: 64", "vocab_size: 65")
    assert len(changed) == len(text)
    (folder / CONFIG_FILE).write_text(changed)
    with pytest.raises(CheckpointError, match="the model's is \\(65, 32\\)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format_version: 1", "format_version: 9", "format version 9"),
        ("num_heads: 2", "num_haeds: 2", "num_heads"),
        ("head_dim: 16", "head_dim: 15", "even number"),
        ("model:", "modle:", "section `model`"),
    ],
)
def test_a_model_yaml_that_is_no_model_is_explained(folder, old, new, message):
    path = folder / CONFIG_FILE
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)


def test_a_folder_that_is_no_model_is_explained(tmp_path):
    with pytest.raises(CheckpointError, match=CONFIG_FILE):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_state(tmp_path / "nowhere")


def test_the_tokenizer_travels_with_the_weights(tmp_path, model):
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    path = tmp_path / "model"
    with (
        pytest.raises(CheckpointError, match=r"tokenizer_config.json"),
        atomic_folder(path) as temporary,
    ):
        save_model(temporary, CONFIG, model.state_dict(), tokenizer_folder=source)
    (source / "tokenizer_config.json").write_text('{"a": 1}')
    with atomic_folder(path) as temporary:
        save_model(temporary, CONFIG, model.state_dict(), tokenizer_folder=source)
    assert (path / "tokenizer_config.json").read_text() == '{"a": 1}'
