"""Wrong input to a conversion: each a clear error, and nothing left behind."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from convert_helpers import save_native, tiny
from safetensors.torch import load_file, save_file

import hrmtext
from hrmtext.artifacts.hf_folder import to_split
from hrmtext.cli.convert import parse_size
from hrmtext.cli.main import main
from hrmtext.convert import convert, open_source
from hrmtext.convert import run as run_module
from hrmtext.errors import CheckpointError, ConfigError, StorageError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A native folder and a Hugging Face folder in the released layout, never changed."""
    root = tmp_path_factory.mktemp("models")
    save_native(tiny(intermediate_size=None), root / "native")
    convert(root / "native", root / "hf", "hf", verify=False)
    return root


@pytest.fixture
def hf(folders, tmp_path):
    """A copy to damage."""
    shutil.copytree(folders / "hf", tmp_path / "hf")
    return tmp_path / "hf"


def rewrite(folder, change):
    """Change the tensors of a folder's file."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors = change(tensors) or tensors
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without(name):
    def change(tensors):
        tensors = to_split(tensors)
        del tensors[name]
        return tensors

    return change


K_PROJ = "model.L_module.layers.0.self_attn.k_proj.weight"
GQKV = "model.L_module.layers.0.attn.gqkv_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head.weight"), "missing lm_head.weight"),
        (without(K_PROJ), f"{GQKV} lacks its part {K_PROJ}"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected extra"),
        (lambda t: t.update({"lm_head.wieght": torch.zeros(2)}), "perhaps you meant 'lm_head.we"),
        (lambda t: t.update({K_PROJ: torch.zeros(32, 32)}), f"{GQKV} is there twice"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(384, 33)}),
            r"lm_head.weight has shape \(384, 33\), the config says \(384, 32\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(384, 32, dtype=torch.int8)}),
            "lm_head.weight has dtype torch.int8, expected a floating one",
        ),
        (
            lambda t: {n: x.double() if n == K_PROJ else x for n, x in to_split(t).items()},
            f"parts of {GQKV} have several dtypes",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(hf, tmp_path, change, message):
    rewrite(hf, change)
    with pytest.raises(CheckpointError, match=message):
        convert(hf, tmp_path / "out", "native")
    with pytest.raises(CheckpointError, match=message):
        hrmtext.load(hf)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 64}, r"has shape \(384, 32\), the config says \(384, 64\)"),
        ({"num_layers_per_stack": 1, "num_hidden_layers": 8}, "unexpected model.H_module.layers.1"),
        ({"num_layers_per_stack": 3, "num_hidden_layers": 24}, "missing model.H_module.layers.2"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rotary type 'yarn'"),
        ({"model_type": "llama"}, "type 'llama', expected 'hrm_text'"),
    ],
)
def test_a_config_that_is_not_the_weights_own_is_refused(hf, tmp_path, values, message):
    set_config(hf, **values)
    with pytest.raises(CheckpointError, match=message):
        convert(hf, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [4, 100, -100])
def test_a_truncated_weights_file_is_refused_before_anything_is_written(hf, tmp_path, kept):
    """In the length, in the header, in the data."""
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        convert(hf, tmp_path / "out", "upstream")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_an_index_that_names_a_missing_shard_is_refused(folders, tmp_path):
    convert(folders / "hf", tmp_path / "s", "hf", max_shard_bytes=50_000, verify=False)
    gone = sorted((tmp_path / "s").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"names the shard {gone.name}, which is not there"):
        convert(tmp_path / "s", tmp_path / "out", "native")


def test_a_result_that_computes_something_else_is_not_kept(folders, tmp_path, monkeypatch):
    """The reader of what was written is made to see other weights."""
    real = run_module.open_stored

    def other(folder):
        stored = real(folder)
        return SimpleNamespace(load_model=lambda dtype: broken(stored.load_model(dtype=dtype)))

    def broken(model):
        model.lm_head.weight.data = model.lm_head.weight.data * 1.01
        return model

    monkeypatch.setattr(run_module, "open_stored", other)
    for form in ("native", "upstream"):
        with pytest.raises(CheckpointError, match=r"our reader's logits differ .* is not kept"):
            convert(folders / "hf", tmp_path / "out", form)
        assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_converted(hf, tmp_path):
    rewrite(hf, lambda t: t["lm_head.weight"].__setitem__((3, 3), float("nan")))
    with pytest.raises(CheckpointError, match="source's own logits are NaN"):
        convert(hf, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_full_is_found_before_writing(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    for form in ("native", "hf", "upstream", "gguf"):
        with pytest.raises(StorageError, match=r"0\.02 GB are needed, 0\.00 GB are free; nothing"):
            convert(folders / "hf", tmp_path / "deep" / "out", form)
    assert list(tmp_path.iterdir()) == []


def test_destinations_that_would_destroy_something_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="source and destination are the same folder"):
        convert(folders / "hf", folders / "native" / ".." / "hf", "native", replace=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        convert(folders / "hf", tmp_path / "there", "native")


def test_options_that_mean_nothing_are_refused(folders, tmp_path):
    out = tmp_path / "out"
    for arguments, message in (
        ({"to": "hf_split"}, "unknown target 'hf_split'; perhaps you meant 'hf-split'"),
        ({"to": "hf", "dtype": "bf61"}, "unknown dtype 'bf61'; perhaps you meant 'bf16'"),
        ({"to": "hf", "weights": "mean"}, "weights 'mean' are unknown"),
        ({"to": "gguf", "dtype": "bf16"}, "number format is its file_type"),
        ({"to": "hf", "file_type": "q8_0"}, "file_type is for GGUF files"),
        ({"to": "native", "max_shard_bytes": 9}, "only Hugging Face folders are written in shards"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(folders / "hf", out, **arguments)
    with pytest.raises(CheckpointError, match="one set of weights"):
        convert(folders / "hf", out, "native", weights="ema")
    with pytest.raises(CheckpointError, match="has no ema weights, only raw"):
        convert(folders / "native", out, "hf", weights="ema")
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_read_as_people_write_them():
    sizes = {"5GB": 5 * 10**9, "500mb": 5 * 10**8, "2GiB": 2 << 30, "1.5k": 1500, "77": 77}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "0", "five", "5TB", "-1"):
        with pytest.raises(ConfigError, match="is not understood"):
            parse_size(text)


def test_the_command_reports_and_fails_as_the_function_does(folders, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["convert", str(folders / "hf"), str(out)]
    assert main([*arguments, "--to", "upstream", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_bit_equal"] is True
    assert report["comparison"]["argmax_agreement"] == 1.0
    assert main([*arguments, "--to", "upstream"]) == 2
    assert "exists already" in capsys.readouterr().err
    other = ["convert", str(out), str(tmp_path / "two"), "--to", "hf-split", "--dtype", "bf16"]
    assert main([*other, "--max-shard-size", "60KB"]) == 0
    shown = capsys.readouterr().out
    for words in ("upstream, ema weights", "prefix mask", "causal", "rounding", "note"):
        assert words in shown
    assert main([*arguments[:2], str(tmp_path / "x"), "--to", "hff"]) == 2
    assert "perhaps you meant 'hf'" in capsys.readouterr().err


def test_sources_of_all_kinds_say_what_they_are(folders):
    found = open_source(folders / "native")
    assert (found.kind, found.weights, found.alternatives) == ("native", "raw", ("raw",))
    assert found.special_ids() == {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
    other = open_source(folders / "hf")
    assert (other.kind, other.weights, other.gradient_routing) == ("hf", "only", [2])
    assert other.token_ids == found.special_ids()
    assert other.config == found.config
    assert other.names() == found.names()
    assert other.nbytes == found.nbytes == sum(other.entry(n).nbytes for n in other.names())
