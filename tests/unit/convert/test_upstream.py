"""Checkpoints of the public training code: read as torch writes them, written as it reads them."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from convert_helpers import save_native, small_tokenizer, tiny
from processes import ended, said, start_ranks
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from upstream_helpers import Averaging, Head, save_shards, write_configs, write_run

import hrmtext
from hrmtext.artifacts.dcp import DcpFolder
from hrmtext.config import preset
from hrmtext.convert import convert, open_source
from hrmtext.errors import CheckpointError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


def averages(model, optimizer):
    names = {param: name for name, param in model.named_parameters()}
    return {names[p]: state["param_ema"] for p, state in optimizer.state.items()}


@pytest.mark.parametrize("by_number", [False, True])
def test_weights_and_averages_are_read_as_torch_saved_them(tmp_path, by_number):
    model, optimizer = write_run(tmp_path / "run", by_number=by_number)
    raw, ema = open_source(tmp_path / "run", "raw"), open_source(tmp_path / "run")
    assert (raw.weights, ema.weights, raw.kind) == ("raw", "ema", "upstream")
    means = averages(model, optimizer)
    state = model.state_dict()
    pairs = {
        "model.H_module.layers.1.attn.gqkv_proj.weight":
            "model.H_level.core.layers.1.attn.gqkv_proj.weight",
        "model.L_module.layers.0.mlp.gate_up_proj.weight":
            "model.L_level.core.layers.0.mlp.gate_up_proj.weight",
        "model.embed_tokens.weight": "embed_tokens.embedding_weight",
        "lm_head.weight": "lm_head.weight",
    }  # fmt: skip
    for ours, theirs in pairs.items():
        assert torch.equal(raw.tensor(ours), state[theirs])
        assert torch.equal(ema.tensor(ours), means[theirs])
        assert not torch.equal(means[theirs], state[theirs])
    for source in (raw, ema):  # a buffer: it has no average
        assert torch.equal(source.tensor("model.z_L_init"), state["model.zL_init"])
        assert source.entry("model.z_L_init").dtype == torch.bfloat16


def test_the_config_is_that_of_both_files(tmp_path):
    write_run(tmp_path / "run")
    source = open_source(tmp_path / "run")
    expected = preset("test", vocab_size=384, max_seq_len=4096, intermediate_size=None)
    assert source.config == expected.canonical()
    assert source.gradient_routing == [0, 3]
    assert source.tokenizer() is None


def test_the_newest_epoch_is_taken_unless_one_is_named(tmp_path):
    for epoch in (2, 10):
        write_run(tmp_path / "run", epoch=epoch)
    assert open_source(tmp_path / "run").folder.name == "fsdp2_epoch_10"
    named = open_source(tmp_path / "run" / "fsdp2_epoch_2", "raw")
    expected = Head(seed=2)
    assert named.tensor("lm_head.weight").shape == expected.lm_head.weight.shape
    assert named.folder.name == "fsdp2_epoch_2"


def test_without_averages_the_weights_are_taken_and_asking_for_them_fails(tmp_path):
    write_run(tmp_path / "run", ema=None)
    assert open_source(tmp_path / "run").weights == "raw"
    with pytest.raises(CheckpointError, match="has no ema weights, only raw"):
        open_source(tmp_path / "run", "ema")


def test_shards_of_several_ranks_are_put_together(tmp_path):
    root = tmp_path / "run"
    write_configs(root)
    ranks = start_ranks(2, save_shards, root, log=tmp_path / "log")
    assert ended(ranks) == [0, 0], said(tmp_path / "log")
    assert len(list((root / "fsdp2_epoch_2").glob("*.distcp"))) == 2
    source = open_source(root, "raw")
    state = Head(seed=3).state_dict()
    name = "model.L_module.layers.1.mlp.down_proj.weight"
    expected = state["model.L_level.core.layers.1.mlp.down_proj.weight"] - 0.1
    assert torch.equal(source.tensor(name), expected)
    assert torch.equal(source.tensor("lm_head.weight"), state["lm_head.weight"] - 0.1)
    report = convert(root, tmp_path / "hf", "hf", weights="ema")
    assert report.is_bit_equal
    assert report.weights == "ema"
    mean = torch.lerp(state["lm_head.weight"], state["lm_head.weight"] - 0.1, 0.5)
    assert torch.equal(open_source(tmp_path / "hf").tensor("lm_head.weight"), mean)


def test_what_is_written_loads_by_torchs_own_function(tmp_path):
    """As the public code loads it: a model and its optimizer's state, every key asked for."""
    model = tiny(intermediate_size=None)
    start = save_native(model, tmp_path / "start")
    convert(start, tmp_path / "up", "upstream")
    theirs = Head(seed=9)
    optimizer = Averaging(theirs.parameters())
    state = {"model": theirs.state_dict(), "optim": get_optimizer_state_dict(theirs, optimizer)}
    dcp.load(state, checkpoint_id=tmp_path / "up" / "fsdp2_epoch_1", no_dist=True)
    ours = model.model.state_dict()
    layer = "layers.1.attn.gqkv_proj.weight"
    assert torch.equal(
        state["model"][f"model.H_level.core.{layer}"], ours[f"model.H_module.{layer}"]
    )
    found = state["optim"]["state"]["lm_head.weight"]
    assert torch.equal(found["param_ema"], ours["lm_head.weight"])
    assert float(found["exp_avg"].abs().max()) == float(found["exp_avg_sq"].abs().max()) == 0
    assert state["optim"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert torch.load(tmp_path / "up" / "carry_epoch_1.0.pt", weights_only=True) is None
    config = yaml.safe_load((tmp_path / "up" / "all_config.yaml").read_text())
    assert (config["arch"]["n_layers"], config["arch"]["half_layers"]) == (4, True)
    metadata = yaml.safe_load((tmp_path / "up" / "train_metadata.yaml").read_text())
    assert metadata["tokenizer_info"]["condition_mapping"]["cot"] == "<|object_ref_end|>"
    assert (metadata["vocab_size"], metadata["max_seq_len"]) == (384, 128)


def test_weights_averages_and_zeros_are_stored_once(tmp_path):
    model = tiny(intermediate_size=None)
    start = save_native(model, tmp_path / "start")
    convert(start, tmp_path / "up", "upstream")
    weights = (start / "model.safetensors").stat().st_size
    stored = (tmp_path / "up" / "fsdp2_epoch_1" / "__0_0.distcp").stat().st_size
    # Weights, average and two moments would be four times as much.
    assert stored < 2.2 * weights


def test_the_tokenizer_beside_the_run_or_where_it_says_is_found(tmp_path):
    write_run(tmp_path / "run")
    away = tmp_path / "tokenizer"
    away.mkdir()
    small_tokenizer().save(away)
    for stated in (away, away / "tokenizer.json"):
        write_configs(tmp_path / "run", tokenizer_path=str(stated))
        assert hrmtext.load(tmp_path / "run").tokenizer.vocab_size == 320
    small_tokenizer().save(tmp_path / "run")
    assert open_source(tmp_path / "run").tokenizer_folder == tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "baselines.rins_nocarry@Rins"}, "only the HRM"),
        ({"norm_type": "post"}, "norm_type is 'post', only 'pre'"),
        ({"pos_emb_type": "none"}, "pos_emb_type is 'none'"),
        ({"H_override": {"n_layers": 3}}, "H_override"),
        ({"n_layers": 5}, "n_layers is 5, which has no half"),
        ({"init_type": "kaiming"}, "init_type is 'kaiming'"),
        ({"n_layers": 6}, r"missing model\.H_module\.layers\.2"),
        ({"expansion": 13}, r"has shape \(512, 32\), the config says \(1024, 32\)"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, change, message):
    write_run(tmp_path / "run")
    write_configs(tmp_path / "run", change)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        ({"init_type": "fixed_normal"}, 50.0),
        ({"init_type": "fixed_normal", "init_std": 0.1}, 10.0),
        ({"init_type": "megatron"}, 32**0.5),
    ],
)
def test_the_embedding_scale_follows_from_the_initialisation(tmp_path, change, scale):
    write_run(tmp_path / "run")
    write_configs(tmp_path / "run", change)
    assert open_source(tmp_path / "run").config.scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 8}, "head_dim = hidden_size / num_heads = 16, this model has 8"),
        ({"intermediate_size": 64}, "multiple of 256, this model's is 64"),
    ],
)
def test_a_shape_that_the_public_code_has_not_is_not_written(tmp_path, changes, message):
    start = save_native(tiny(**{"intermediate_size": None, **changes}), tmp_path / "start")
    with pytest.raises(ConfigError, match=message):
        convert(start, tmp_path / "up", "upstream")
    assert not (tmp_path / "up").exists()


def test_a_scale_of_ones_own_survives(tmp_path):
    start = save_native(tiny(intermediate_size=None, embedding_scale=3.3), tmp_path / "start")
    convert(start, tmp_path / "up", "upstream")
    assert open_source(tmp_path / "up").config.scale == pytest.approx(3.3, rel=1e-15)


def test_damaged_folders_are_refused_with_the_reason(tmp_path):
    write_run(tmp_path / "run")
    folder = tmp_path / "run" / "fsdp2_epoch_1"
    data = next(folder.glob("*.distcp"))
    whole, metadata = data.read_bytes(), (folder / ".metadata").read_bytes()
    data.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match="was truncated: expected at least"):
        open_source(tmp_path / "run")
    data.unlink()
    with pytest.raises(CheckpointError, match="which its metadata names"):
        open_source(tmp_path / "run")
    data.write_bytes(b"\x00" * len(whole))
    source = open_source(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight\S* is damaged"):
        source.tensor("lm_head.weight")
    (folder / ".metadata").write_bytes(metadata[: len(metadata) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as checkpoint metadata"):
        open_source(tmp_path / "run")
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="is not the metadata"):
        open_source(tmp_path / "run")
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"has no \.metadata"):
        open_source(tmp_path / "run")
    data.unlink()
    folder.rmdir()
    with pytest.raises(CheckpointError, match="no weights: expected folders fsdp2_epoch_1"):
        open_source(tmp_path / "run")


class Runs:
    """Unpickling this runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_metadata_that_would_run_code_is_refused(tmp_path):
    write_run(tmp_path / "run")
    folder = tmp_path / "run" / "fsdp2_epoch_1"
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(str(tmp_path / "ran"))))
    with pytest.raises(CheckpointError, match="is no record of checkpoint metadata"):
        DcpFolder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_would_run_code_is_refused(tmp_path):
    write_run(tmp_path / "run")
    folder = tmp_path / "run" / "fsdp2_epoch_1"
    store = DcpFolder(folder)
    ((_, info),) = store._chunks["model.lm_head.weight"]
    evil = tmp_path / "evil"
    torch.save(Runs(str(tmp_path / "ran")), evil)
    data = bytearray((folder / info.relative_path).read_bytes())
    data[info.offset : info.offset + info.length] = evil.read_bytes().ljust(info.length, b"\0")
    (folder / info.relative_path).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="is damaged"):
        store.read("model.lm_head.weight")
    assert not (tmp_path / "ran").exists()
