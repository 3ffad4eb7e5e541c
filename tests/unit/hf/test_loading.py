"""Folders of every layout load into our classes and out again; wrong ones are refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from hf_cases import prompts, small_model
from safetensors.torch import load_file, save_file

from hrmtext.artifacts.hf_folder import to_split
from hrmtext.errors import CheckpointError
from hrmtext.hf import HrmTextForCausalLM, HrmTextModel

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A saved model; its path and what it answers."""
    model = small_model(seed=2)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", logits_of(model)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    batch = prompts()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model.eval()(**batch, position_ids=positions).logits[batch["attention_mask"].bool()]


def rewrite(path, change) -> None:
    tensors = load_file(path / WEIGHTS)
    save_file(
        {n: t.contiguous() for n, t in change(tensors).items()}, path / WEIGHTS, {"format": "pt"}
    )


def test_save_and_load_are_exact_and_the_file_is_in_the_released_layout(folder):
    path, expected = folder
    assert torch.equal(logits_of(HrmTextForCausalLM.from_pretrained(path)), expected)
    names = set(load_file(path / WEIGHTS))
    assert "model.L_module.layers.1.attn.gqkv_proj.weight" in names
    assert {"model.z_L_init", "lm_head.weight", "model.embed_tokens.weight"} <= names


def test_transformers_reads_ours_and_we_read_transformers(folder, tmp_path):
    path, expected = folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert type(theirs) is transformers.HrmTextForCausalLM
    torch.testing.assert_close(logits_of(theirs), expected, atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = HrmTextForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(logits_of(again), expected)


def test_split_files_load(folder):
    path, expected = folder
    rewrite(path, to_split)
    assert not any("gqkv" in name for name in load_file(path / WEIGHTS))
    assert torch.equal(logits_of(HrmTextForCausalLM.from_pretrained(path)), expected)


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_sharded_files_load(folder, tmp_path, layout):
    path, expected = folder
    model = HrmTextForCausalLM.from_pretrained(path)
    if layout == "fused":
        model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    else:
        model.config.save_pretrained(tmp_path / "shards")
        tensors = {n: t.contiguous() for n, t in to_split(model.state_dict()).items()}
        weight_map = {}
        for shard in range(3):  # the parts of one fused matrix lie in several shards
            name = f"model-{shard + 1:05}-of-00003.safetensors"
            part = dict(sorted(tensors.items())[shard::3])
            save_file(part, tmp_path / "shards" / name, {"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    again = HrmTextForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits_of(again), expected)


def test_the_base_model_loads_from_a_whole_one(folder):
    path, _ = folder
    base, whole = HrmTextModel.from_pretrained(path), HrmTextForCausalLM.from_pretrained(path)
    batch = prompts()
    states = [m(batch["input_ids"], token_type_ids=batch["token_type_ids"]).last_hidden_state
              for m in (base.eval(), whole.model.eval())]  # fmt: skip
    assert torch.equal(*states)


# transformers wants every tensor mapped, and warns of keys that name no module.
@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_bf16_and_device_maps_load(folder, tmp_path):
    path, expected = folder
    narrow = HrmTextForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in narrow.state_dict().values()} == {torch.bfloat16}
    mapped = HrmTextForCausalLM.from_pretrained(path, device_map="auto")
    assert torch.equal(logits_of(mapped), expected)
    offloaded = HrmTextForCausalLM.from_pretrained(
        path,
        device_map={
            "model.embed_tokens": "cpu",
            "model.z_L_init": "cpu", "model.H_module": "cpu",
            "model.L_module": "disk", "lm_head": "cpu",
        },
        offload_folder=tmp_path / "offload",
    )  # fmt: skip
    held = offloaded.model.L_module.layers[0].attn.o_proj.weight
    assert held.device.type == "meta", "the L stack was to stay on disk"
    assert torch.equal(logits_of(offloaded), expected)


AUTOMATIC = """
import sys, hrmtext.hf, transformers
folder = sys.argv[1]
print(type(transformers.AutoModelForCausalLM.from_pretrained(folder)).__module__)
hrmtext.hf.register_auto_classes()
print(type(transformers.AutoModelForCausalLM.from_pretrained(folder)).__module__)
print(type(transformers.AutoModel.from_pretrained(folder)).__module__)
"""


def test_automatic_classes_choose_ours_only_when_told(folder):
    path, _ = folder
    done = subprocess.run(
        [sys.executable, "-c", AUTOMATIC, str(path)], capture_output=True, text=True, check=True
    )
    theirs, ours = "transformers.models.hrm_text.modeling_hrm_text", "hrmtext.hf.modeling"
    assert done.stdout.split() == [theirs, ours, ours]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n: w for n, w in t.items() if n != "model.z_L_init"}, "missing model.z_L_init"),
        (
            lambda t: {n: w for n, w in t.items() if "L_module.layers.1.mlp.down" not in n},
            r"missing model.L_module.layers.1.mlp.down_proj.weight",
        ),
        (
            lambda t: t | {"model.extra.weight": t["lm_head.weight"].clone()},
            "unexpected model.extra.weight",
        ),
    ],
    ids=["no z_L_init", "no down_proj", "extra"],
)
def test_a_missing_or_extra_tensor_is_refused(folder, change, words):
    path, _ = folder
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=words):
        HrmTextForCausalLM.from_pretrained(path)


def test_a_split_matrix_without_one_of_its_parts_is_refused(folder):
    path, _ = folder
    gone = "model.H_module.layers.0.self_attn.k_proj.weight"
    rewrite(path, lambda t: {n: w for n, w in to_split(t).items() if n != gone})
    with pytest.raises(CheckpointError, match=r"H_module.layers.0.attn.gqkv_proj.* \(96, 32\)"):
        HrmTextForCausalLM.from_pretrained(path)


def test_shapes_that_do_not_fit_the_config_are_refused(folder):
    path, _ = folder
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"gate_up_proj.* \(96, 32\), .* \(128, 32\)"):
        HrmTextForCausalLM.from_pretrained(path)


def test_a_truncated_file_is_refused(folder):
    path, _ = folder
    content = (path / WEIGHTS).read_bytes()
    for kept in (len(content) - 100, 40):
        (path / WEIGHTS).write_bytes(content[:kept])
        with pytest.raises(Exception, match=r"(?i)incomplete|header|truncated"):
            HrmTextForCausalLM.from_pretrained(path)
