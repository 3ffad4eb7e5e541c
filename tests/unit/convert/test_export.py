"""Exported folders: plain transformers code computes and generates what we do."""

import json
import subprocess
import sys

import pytest
import torch
from convert_helpers import PROMPTS, save_native, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import hrmtext
from hrmtext.artifacts import hf_folder
from hrmtext.config.generate import GenerateConfig
from hrmtext.convert import export_hf
from hrmtext.convert import run as run_module
from hrmtext.convert import write as write_module
from hrmtext.errors import CheckpointError, ConfigError, StorageError
from hrmtext.generate import load

HEADS = {"direct": "<|object_ref_start|>", "synth,cot": "<|quad_end|><|object_ref_end|>"}


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("condition", list(HEADS))
def test_plain_transformers_generates_our_tokens_from_a_padded_batch(tmp_path, layout, condition):
    model = tiny()
    report = export_hf(model, tmp_path / "out", layout=layout)
    assert report.comparison.argmax_agreement == 1.0
    assert report.comparison.max_difference < 1e-4
    assert (report.layout, report.dtype) == (layout, "float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompts = PROMPTS[:3]
    texts = [f"<|im_start|>{HEADS[condition]}{text}<|im_end|>" for text in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert bool((batch["attention_mask"] == 0).any()), "the batch must hold padding"
    generated = theirs.generate(**batch, max_new_tokens=24)[:, batch["input_ids"].shape[1] :]
    ours = model.generate_tokens(prompts, condition, GenerateConfig(max_new_tokens=24))
    for row, answer in zip(generated.tolist(), ours, strict=True):
        end = row.index(11) + 1 if 11 in row else len(row)
        assert row[:end] == answer.tokens
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        assert text == model.tokenizer.decode(answer.tokens)


def test_without_type_ids_transformers_would_answer_causally(tmp_path):
    """The commonest fault in the field; the exported tokenizer is what prevents it."""
    model = tiny()
    export_hf(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([model.tokenizer.encode_prompt(PROMPTS[2])])
    with torch.no_grad():
        causal = theirs(input_ids=ids).logits[0]
    assert (causal - model.logits(PROMPTS[2])).abs().max() > 1e-2


def test_the_chat_template_gives_our_prompt(tmp_path):
    model = tiny()
    export_hf(model, tmp_path / "out", verify=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], tokenize=True, return_dict=True
    )
    assert list(rendered["input_ids"]) == model.tokenizer.encode_prompt(PROMPTS[0])
    assert set(rendered["token_type_ids"]) == {1}


def test_the_folder_holds_the_files_and_values_that_others_read(tmp_path):
    model = tiny()
    report = export_hf(model, tmp_path / "out", dtype="bf16", L_bp_cycles=[0, 3])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert not any("COMPLETE" in name for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["HrmTextForCausalLM"], "bos_token_id": 6, "eos_token_id": 11,
        "pad_token_id": 5, "num_layers_per_stack": 2, "num_hidden_layers": 16,
        "L_bp_cycles": [0, 3], "dtype": "bfloat16", "prefix_lm": True,
    }  # fmt: skip
    assert expected.items() <= config.items()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["do_sample"]) == (11, False)
    loaded = load(tmp_path / "out", dtype="fp32")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name].bfloat16().float())
    assert report.dtype == "bfloat16"
    assert report.size_bytes > 2 * sum(p.numel() for p in model.model.parameters())


def test_a_native_folder_exports_its_ema_and_reads_back(tmp_path):
    raw, ema = tiny(seed=1), tiny(seed=2)
    folder = save_native(raw, tmp_path / "native", ema)
    export_hf(folder, tmp_path / "ema")
    export_hf(folder, tmp_path / "raw", weights="raw")
    export_hf(tmp_path / "raw", tmp_path / "again", layout="split")
    for name, expected in (("ema", ema), ("raw", raw), ("again", raw)):
        found = load(tmp_path / name)
        assert torch.equal(found.logits(PROMPTS[0]), expected.logits(PROMPTS[0]))


def test_an_export_with_other_tensors_leaves_nothing_behind(tmp_path, monkeypatch):
    real = write_module.place_of

    def swapped(name, form):
        for one, other in (("q_proj", "k_proj"), ("k_proj", "q_proj")):
            if one in name:
                return real(name.replace(one, other), form)
        return real(name, form)

    monkeypatch.setattr(write_module, "place_of", swapped)
    with pytest.raises(CheckpointError, match="differs from what was written"):
        export_hf(tiny(), tmp_path / "out", layout="split")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"), [("rope_parameters", {"rope_type": "default", "rope_theta": 50.0}),
                       ("embedding_scale", 5.0), ("prefix_lm", False), ("L_cycles", 2)],
)  # fmt: skip
def test_a_wrong_value_in_the_config_is_found_twice(tmp_path, monkeypatch, key, value):
    """By reading the config back, and without that by the logits."""
    real = hf_folder.to_hf_config

    def wrong(*args, **kwargs):
        found = real(*args, **kwargs) | {key: value}
        if key == "L_cycles":
            found["num_hidden_layers"] = 2 * 2 * (value + 1)
        return found

    monkeypatch.setattr(hf_folder, "to_hf_config", wrong)
    with pytest.raises(CheckpointError, match="config read back"):
        export_hf(tiny(), tmp_path / "out")
    monkeypatch.setattr(run_module, "require_equal_content", lambda reader, folder: None)
    with pytest.raises(CheckpointError, match="transformers' logits differ"):
        export_hf(tiny(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten_in_silence(tmp_path):
    model = tiny()
    export_hf(model, tmp_path / "out", verify=False)
    with pytest.raises(StorageError, match="exists already"):
        export_hf(model, tmp_path / "out", verify=False)
    export_hf(tiny(seed=9), tmp_path / "out", verify=False, replace=True)
    assert not torch.equal(load(tmp_path / "out").logits("x"), model.logits("x"))
    with pytest.raises(ConfigError, match="perhaps you meant 'split'"):
        export_hf(model, tmp_path / "other", layout="splt")


def test_load_recognises_what_a_path_holds(tmp_path):
    model, ema = tiny(), tiny(seed=3)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("{}\n")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        hrmtext.load(run)
    save_native(tiny(seed=8), run / "checkpoints" / "step_0000001")
    newest = save_native(model, run / "checkpoints" / "step_0000020", ema)
    expected = ema.logits(PROMPTS[0])
    for path in (run, newest, str(run)):
        assert torch.equal(hrmtext.load(path).logits(PROMPTS[0]), expected)
    raw = hrmtext.load(run, weights="raw", dtype="fp32", device="cpu")
    assert torch.equal(raw.logits(PROMPTS[0]), model.logits(PROMPTS[0]))
    (newest / "COMPLETE.json").unlink()
    older = hrmtext.load(run)
    assert torch.equal(older.logits(PROMPTS[0]), tiny(seed=8).logits(PROMPTS[0]))
    assert hrmtext.load(run, dtype="bf16").dtype == torch.bfloat16


def test_load_says_what_it_found_instead(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path / "empty")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="type 'llama'"):
        load(tmp_path / "llama")
    export_hf(tiny(), tmp_path / "out", verify=False)
    with pytest.raises(CheckpointError, match="one set of weights"):
        load(tmp_path / "out", weights="ema")
    with pytest.raises(ConfigError, match="raw, ema"):
        load(tmp_path / "out", weights="best")


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, hrmtext; assert 'torch' not in sys.modules; assert 'load' in dir(hrmtext); "
        "hrmtext.load; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = hrmtext.laod
