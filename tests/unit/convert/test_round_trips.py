"""Every form into every form: the same bits, the same shape, the same logits."""

import hashlib
import json
from functools import cache

import pytest
import torch
from convert_helpers import PROMPTS, save_native, tiny
from transformers import AutoModelForCausalLM

import hrmtext
from hrmtext.artifacts import read_config
from hrmtext.convert import convert, open_source
from hrmtext.errors import CheckpointError

FORMS = ("native", "hf", "hf-split", "upstream")


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_for(dtype=torch.float32, **changes):
    """Of a shape that every form can say: a SwiGLU width of a multiple of 256."""
    model = tiny(**{"intermediate_size": None, **changes})
    model.model.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_way_through_all_forms_ends_with_the_same_file(tmp_path, dtype):
    model = model_for(dtype, max_seq_len=96, rope_theta=5e5, L_cycles=2)
    start = save_native(model, tmp_path / "start")
    path = start
    for number, form in enumerate(("hf", "hf-split", "upstream", "native")):
        report = convert(path, tmp_path / f"{number}", form)
        assert report.is_bit_equal
        assert report.comparison.argmax_agreement == 1.0
        assert report.dtype == str(dtype).removeprefix("torch.")
        path = tmp_path / f"{number}"
    assert digest(path / "model.safetensors") == digest(start / "model.safetensors")
    assert read_config(path) == read_config(start)
    again, first = hrmtext.load(path), hrmtext.load(start)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert torch.equal(again.logits(PROMPTS[0]), first.logits(PROMPTS[0]))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Form -> a model and its folder in that form, each written once."""

    @cache
    def make(form):
        folder = tmp_path_factory.mktemp(form)
        model = model_for(prefix_lm=form != "hf")
        convert(save_native(model, folder / "start"), folder / "one", form)
        return model, folder / "one"

    return make


@pytest.mark.parametrize("last", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_every_form_converts_into_every_form(converted, tmp_path, first, last):
    model, start = converted(first)
    report = convert(start, tmp_path / "two", last)
    assert report.is_bit_equal
    assert report.source_kind == first.removesuffix("-split")
    loaded = hrmtext.load(tmp_path / "two", dtype="fp32")
    assert loaded.config.prefix_lm == model.config.prefix_lm
    assert torch.equal(loaded.logits(PROMPTS[2]), model.logits(PROMPTS[2]))


def test_shards_load_in_transformers_and_here(tmp_path):
    model = model_for()
    start = save_native(model, tmp_path / "start")
    convert(start, tmp_path / "shards", "hf-split", max_shard_bytes=60_000)
    folder = tmp_path / "shards"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert not (folder / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == open_source(folder).nbytes
    # Only a tensor that is larger than the limit by itself has a larger file.
    largest = max(p.numel() for p in model.model.parameters()) * 4
    assert all(file.stat().st_size < max(60_000, largest) + 4_096 for file in files)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, model.model.lm_head.weight)
    report = convert(folder, tmp_path / "again", "native")
    assert report.is_bit_equal
    assert digest(tmp_path / "again" / "model.safetensors") == digest(start / "model.safetensors")


def test_a_narrower_format_is_checked_and_its_cost_is_told(tmp_path):
    model = model_for()
    start = save_native(model, tmp_path / "start")
    report = convert(start, tmp_path / "half", "hf", dtype="bf16")
    assert not report.is_bit_equal
    assert report.comparison.max_difference < 1e-4 < report.rounding.max_difference
    assert 0 < report.rounding.kl < 1e-2
    wide = convert(tmp_path / "half", tmp_path / "wide", "native", dtype="fp32")
    assert wide.rounding is None
    for name, tensor in hrmtext.load(tmp_path / "wide").model.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name].bfloat16().float())


def test_a_value_that_a_format_cannot_hold_is_refused(tmp_path):
    model = model_for()
    model.model.lm_head.weight.data[3, 4] = 1e6
    start = save_native(model, tmp_path / "start")
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds values up to 1e\+06"):
        convert(start, tmp_path / "half", "hf", dtype="fp16")
    assert not (tmp_path / "half").exists()


def test_tensors_of_several_number_formats_keep_them(tmp_path):
    """The public training code holds z_L_init in bf16 beside fp32 matrices."""
    model = model_for()
    model.model.model.z_L_init.data = model.model.model.z_L_init.data.bfloat16()
    start = save_native(model, tmp_path / "start")
    path = start
    for form in ("upstream", "hf", "hf-split", "native"):
        convert(path, tmp_path / form, form)
        path = tmp_path / form
        found = open_source(path)
        assert found.entry("model.z_L_init").dtype == torch.bfloat16
        assert found.dtype == torch.float32
    assert digest(path / "model.safetensors") == digest(start / "model.safetensors")


def test_the_weights_taken_are_named(tmp_path):
    raw, ema = model_for(seed=1), model_for(seed=2)
    start = save_native(raw, tmp_path / "start", ema)
    report = convert(start, tmp_path / "ema", "hf")
    assert report.weights == "ema"
    assert any("raw and ema weights: ema taken" in note for note in report.notes)
    assert convert(start, tmp_path / "raw", "hf", weights="raw").weights == "raw"
    for name, model in (("ema", ema), ("raw", raw)):
        found = hrmtext.load(tmp_path / name).logits(PROMPTS[0])
        assert torch.equal(found, model.logits(PROMPTS[0]))


def test_a_model_without_tokenizer_converts_and_says_so(tmp_path):
    model = model_for()
    start = save_native(model, tmp_path / "start")
    convert(start, tmp_path / "hf", "hf")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "hf" / file).unlink()
    report = convert(tmp_path / "hf", tmp_path / "split", "hf-split")
    assert any("no tokenizer" in note for note in report.notes)
    assert report.comparison.num_positions == 9 + 4 + 17 + 11 + 30
    given = convert(tmp_path / "split", tmp_path / "full", "native", tokenizer_folder=start)
    assert given.notes == []
    assert torch.equal(hrmtext.load(tmp_path / "full").logits("x"), model.logits("x"))


def test_without_verification_nothing_is_compared(tmp_path):
    start = save_native(model_for(), tmp_path / "start")
    report = convert(start, tmp_path / "out", "hf", verify=False)
    assert (report.comparison, report.is_bit_equal) == (None, False)


def test_gradient_routing_travels_as_far_as_a_form_can_say_it(tmp_path):
    start = save_native(model_for(), tmp_path / "start")
    convert(start, tmp_path / "hf", "hf", L_bp_cycles=[0, 3])
    convert(tmp_path / "hf", tmp_path / "up", "upstream")
    assert open_source(tmp_path / "up").gradient_routing == [0, 3]
    convert(tmp_path / "up", tmp_path / "split", "hf-split")
    assert json.loads((tmp_path / "split" / "config.json").read_text())["L_bp_cycles"] == [0, 3]
    convert(start, tmp_path / "other", "hf", L_bp_cycles=[2, 1])
    report = convert(tmp_path / "other", tmp_path / "up2", "upstream")
    assert any("cannot be said by bp_max_steps" in note for note in report.notes)
