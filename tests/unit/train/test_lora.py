"""Adapters: at first nothing changes, only they learn, they resume exactly, merge and move."""

import dataclasses
import json
import shutil

import pytest
import torch
from memory_source import MemorySource, random_rows, small_config

import hrmtext
from hrmtext.artifacts import load_model, read_tensors
from hrmtext.artifacts.adapters import fingerprint_of
from hrmtext.artifacts.opening import open_stored
from hrmtext.batch import PackedBatch
from hrmtext.config.base import build, to_mapping
from hrmtext.config.finetune import TARGETS, LoraConfig
from hrmtext.config.model import ModelConfig
from hrmtext.config.train import TrainConfig
from hrmtext.convert import convert
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.model import build_model, make_plan
from hrmtext.runtime.io import atomic_folder
from hrmtext.train import train_on
from hrmtext.train.lora import add_adapters, count_adapters, parameter_groups
from hrmtext.train.metrics import read_metrics
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.parallel import choose_layout
from hrmtext.train.step import TrainStep

LORA = {"rank": 2, "alpha": 4.0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    PromptTokenizer(train_tokenizer(["to be or not to be"] * 20, 290)).save(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    """A run to start from, of a vocabulary that holds the tokenizer's."""
    source = MemorySource(random_rows(24))
    source.tokenizer_folder = tokenizer_folder
    config = small_config(model={"preset": "test", "vocab_size": 512}, validate_every=0)
    folder = tmp_path_factory.mktemp("base") / "run"
    return train_on(config, source, run_folder=folder, progress="none")


def settings(base, **changes) -> TrainConfig:
    values = to_mapping(small_config(model={"preset": "test", "vocab_size": 512}))
    values |= {"init_from": str(base.checkpoint), "lora": LORA, "max_steps": 6, "bp_first": 5}
    return build(TrainConfig, {**values, **changes}, where="test")


def fine_tune(base, folder, tokenizer_folder=None, **changes):
    source = MemorySource(random_rows(24, seed=9), heldout=random_rows(8, seed=5))
    source.tokenizer_folder = tokenizer_folder
    return train_on(settings(base, **changes), source, run_folder=folder, progress="none")


@pytest.fixture(scope="module")
def tuned(base, tokenizer_folder, tmp_path_factory):
    return fine_tune(base, tmp_path_factory.mktemp("tuned") / "run", tokenizer_folder)


def logits(model, rows):
    batch = PackedBatch.from_rows(rows)
    plan = make_plan(batch.layout, device=CPU, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        return model(batch.tokens, batch.positions, plan).logits


def unmerged(run, which, dtype):
    """The base with adapters on it, as training runs it: nothing is merged."""
    folder = run.checkpoint
    record = json.loads((folder / "base.json").read_text())
    lora = build(LoraConfig, record["lora"], where="test")
    model = open_stored(record["path"], "auto").load_model()
    add_adapters(model, lora, seed=0)
    file = "adapter_raw.safetensors" if which == "raw" else "adapter_model.safetensors"
    saved = read_tensors(folder / file)
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        if ".lora_" not in name:
            continue
        linear, half = name.rsplit(".", 1)
        prefix, inside = linear.split(".attn." if ".attn." in linear else ".mlp.")
        parts = {
            "gqkv_proj": ["self_attn.gate_proj", "self_attn.q_proj", "self_attn.k_proj",
                          "self_attn.v_proj"],
            "o_proj": ["self_attn.o_proj"],
            "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
            "down_proj": ["mlp.down_proj"],
        }[inside]  # fmt: skip
        keys = [f"base_model.model.{prefix}.{part}.{half}.weight" for part in parts]
        parameter.data = torch.stack([saved[key] for key in keys if key in saved])
    return model.to(dtype)


def test_fresh_adapters_change_nothing_and_all_else_is_frozen():
    model = build_model(ModelConfig(**SHAPE), seed=0)
    rows = random_rows(4)
    before = logits(model, rows)
    names = {name for name, _ in model.named_parameters()}
    add_adapters(model, LoraConfig(**LORA), seed=1)
    assert torch.equal(logits(model, rows), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, _ in model.named_parameters()} - trained == names
    assert all(".lora_" in name for name in trained)
    again = build_model(ModelConfig(**SHAPE), seed=0)
    add_adapters(again, LoraConfig(**LORA), seed=1)
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name


SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_layers_per_stack": 2, "num_heads": 2,
         "head_dim": 16, "intermediate_size": 64, "max_seq_len": 128}  # fmt: skip


@pytest.mark.parametrize("targets", [("q",), ("k", "v"), ("gate", "up"), tuple(TARGETS)])
@pytest.mark.parametrize("stacks", ["H", "L", "both"])
def test_an_adapter_is_the_sum_of_base_and_update_on_the_chosen_rows(targets, stacks):
    """Oracle: W + alpha / rank * B @ A written into a plain model's weights, in fp64."""
    model = build_model(ModelConfig(**SHAPE), seed=0, dtype=torch.float64)
    oracle = build_model(ModelConfig(**SHAPE), seed=0, dtype=torch.float64)
    lora = LoraConfig(rank=3, alpha=2.0, targets=targets, stacks=stacks)
    add_adapters(model, lora, seed=1)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=generator)
    order = {"gqkv_proj": ("gate", "q", "k", "v"), "o_proj": ("o",),
             "gate_up_proj": ("mlp_gate", "up"), "down_proj": ("down",)}  # fmt: skip
    num_updates = 0
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            linear = name.removesuffix(".weight")
            kinds = order.get(linear.rsplit(".", 1)[-1])
            wanted = kinds and [kind for kind in kinds if kind in targets]
            if not wanted or stacks not in ("both", linear.split(".")[1][0]):
                continue
            adapted = model.get_submodule(linear)
            for place, kind in enumerate(wanted):
                rows = weight.chunk(len(kinds))[kinds.index(kind)]
                rows += 2.0 / 3 * adapted.lora_B[place] @ adapted.lora_A[place]
                num_updates += 1
    assert num_updates == len(targets) * 2 * len("HL" if stacks == "both" else stacks)
    rows = random_rows(4)
    torch.testing.assert_close(logits(model, rows), logits(oracle, rows), rtol=1e-10, atol=1e-10)
    assert count_adapters(model.config, lora) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_only_adapters_are_trained_averaged_and_stored(base, tuned):
    stored = {file.name: file for file in tuned.checkpoint.iterdir()}
    assert "model.safetensors" not in stored and "ema.safetensors" not in stored
    raw, ema = (read_tensors(stored[f"adapter_{n}.safetensors"]) for n in ("raw", "model"))
    assert raw.keys() == ema.keys() and len(raw) == 2 * 8 * 2 * 2  # halves, targets, layers, stacks
    assert all(float(raw[name].abs().sum()) > 0 for name in raw)
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)
    moments = read_tensors(stored["optimizer.safetensors"])
    assert all(".lora_" in name for name in moments)
    weights = sum(t.numel() for t in read_tensors(base.checkpoint / "model.safetensors").values())
    assert sum(tensor.numel() for tensor in raw.values()) < 0.25 * weights


@pytest.mark.parametrize("which", ["raw", "ema"])
def test_merged_weights_give_the_unmerged_logits_within_rounding(tuned, which):
    merged = open_stored(tuned.run_folder, which)
    assert (merged.kind, merged.weights) == ("adapters", which)
    rows = random_rows(6, seed=3)
    exact = logits(unmerged(tuned, which, torch.float64), rows)
    rounded = logits(unmerged(tuned, which, torch.float32), rows)
    budget = 4 * float((rounded.double() - exact).abs().max()) + 1e-7
    difference = float((logits(merged.load_model(), rows).double() - exact).abs().max())
    assert difference <= budget
    plain = logits(open_stored(json.loads((tuned.checkpoint / "base.json").read_text())["path"])
                   .load_model(), rows)  # fmt: skip
    assert float((plain.double() - exact).abs().max()) > 100 * budget


def test_a_run_of_adapters_loads_generates_and_exports(tuned, tmp_path):
    model = hrmtext.load(tuned.run_folder)
    answers = model.generate(["to be"], max_new_tokens=4)
    report = convert(tuned.run_folder, tmp_path / "hf", "hf")  # compares logits with transformers
    assert report.comparison is not None and report.source_kind == "adapters"
    again = hrmtext.load(tmp_path / "hf").generate(["to be"], max_new_tokens=4)
    assert again == answers
    convert(tuned.run_folder, tmp_path / "native", "native")
    first = open_stored(tuned.run_folder)
    second = open_stored(tmp_path / "native")
    assert all(torch.equal(first.tensor(name), second.tensor(name)) for name in first.names())


# peft asks a model for it by the name that transformers 5.24 replaces.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_reads_the_adapters_for_transformers_class(tuned, base, tmp_path):
    import transformers
    from peft import PeftModel

    convert(base.checkpoint, tmp_path / "hf", "hf-split", verify=False)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    adapted = PeftModel.from_pretrained(plain, str(tuned.checkpoint)).merge_and_unload()
    state = adapted.state_dict()
    ours = open_stored(tuned.checkpoint, "ema")
    part = "model.H_module.layers.1.self_attn.v_proj.weight"
    rows = ours.tensor("model.H_module.layers.1.attn.gqkv_proj.weight").chunk(4)[3]
    torch.testing.assert_close(state[part], rows, rtol=1e-5, atol=1e-6)
    for name in ("mlp.gate_proj", "mlp.down_proj"):
        assert f"model.L_module.layers.0.{name}.weight" in state


def test_another_base_is_refused_and_the_right_one_can_be_named(base, tmp_path, tokenizer_folder):
    moved = tmp_path / "moved"
    shutil.copytree(base.checkpoint, tmp_path / "first")
    config = {"init_from": str(tmp_path / "first"), "max_steps": 1}
    result = fine_tune(base, tmp_path / "run", tokenizer_folder, **config)
    (tmp_path / "first").rename(moved)
    with pytest.raises(CheckpointError, match="base cannot be opened"):
        hrmtext.load(result.run_folder)
    assert hrmtext.load(result.run_folder, base=moved).config.hidden_size == 32
    other = load_model(moved, "ema")
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 1e-3
    from hrmtext.artifacts.weights import save_model

    with atomic_folder(tmp_path / "other") as folder:
        save_model(folder, other.config, other.state_dict())
    with pytest.raises(CheckpointError, match="adapters for other weights"):
        hrmtext.load(result.run_folder, base=tmp_path / "other")
    with pytest.raises(ConfigError, match="leave out base"):
        hrmtext.load(moved, base=moved)


def test_a_fingerprint_is_of_the_values_not_of_their_form(base, tmp_path):
    convert(base.checkpoint, tmp_path / "hf", "hf-split", verify=False)
    ours = fingerprint_of(open_stored(base.checkpoint))
    assert fingerprint_of(open_stored(tmp_path / "hf")) == ours
    assert fingerprint_of(open_stored(base.checkpoint, "raw")) != ours


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    base, tmp_path, precision, monkeypatch
):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    options = {"precision": precision, "checkpoint_every": 2}
    original = TrainStep.run

    def failing(self, *args, **kwargs):
        if kwargs["step"] == 3:  # one step after the first checkpoint
            raise RuntimeError("the power is gone")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "run", failing)
        with pytest.raises(RuntimeError, match="power"):
            fine_tune(base, parts, **options)
    results = [fine_tune(base, folder, **options) for folder in (parts, whole)]
    for name in ("adapter_raw", "adapter_model", "optimizer"):
        one, two = (read_tensors(r.checkpoint / f"{name}.safetensors") for r in results)
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items()), name
    logs = [
        [{k: v for k, v in r.items() if k != "timing"} for r in read_metrics(f / "metrics.jsonl")]
        for f in (parts, whole)
    ]
    assert logs[0] == logs[1]


def test_a_resumed_run_refuses_another_base(base, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(base.checkpoint, source)
    fine_tune(base, tmp_path / "run", init_from=str(source), max_minutes=1e-9)
    shutil.rmtree(source)
    convert(base.checkpoint, source, "native", weights="raw", verify=False)
    with pytest.raises(CheckpointError, match="adapters for other weights than init_from"):
        fine_tune(base, tmp_path / "run", init_from=str(source))


def test_recomputed_blocks_give_the_same_adapters(base, tmp_path):
    results = [
        fine_tune(base, tmp_path / which, activation_checkpointing=which, max_steps=3)
        for which in ("none", "all")
    ]
    one, two = (read_tensors(r.checkpoint / "adapter_raw.safetensors") for r in results)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_rates_fall_with_the_calls_of_a_stack():
    model = build_model(ModelConfig(**SHAPE), seed=0)
    lora = LoraConfig(**LORA)
    add_adapters(model, lora, seed=0)
    groups = parameter_groups(model, lora)
    assert [group["lr_scale"] for group in groups] == [1 / 2, 1 / 6]
    optimizer = AdamAtan2(groups, lr=1.0)
    optimizer.set_lr(0.6)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3, 0.1])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    by_name = dict(model.named_parameters())
    assert order == [id(by_name[name]) for name in names]
    fixed = dataclasses.replace(lora, lr_scale=0.25, stacks="L")
    single = build_model(ModelConfig(**SHAPE), seed=0)
    add_adapters(single, fixed, seed=0)
    assert [group["lr_scale"] for group in parameter_groups(single, fixed)] == [0.25]


def test_several_ranks_hold_the_frozen_weights_whole_also_on_gpus(base, monkeypatch):
    monkeypatch.setattr("hrmtext.runtime.dist.world_size", lambda: 4)
    for device in ("cpu", "cuda"):
        assert choose_layout(settings(base), torch.device(device)).strategy == "ddp"


def test_what_cannot_be_meant_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="init_from names none"):
        fine_tune(base, tmp_path / "run", init_from=None)
    with pytest.raises(ConfigError, match="adapters start without one"):
        settings(base, init_optimizer=True)
    with pytest.raises(ConfigError, match=r"lora\.rank is 0"):
        settings(base, lora={"rank": 0})
    with pytest.raises(ConfigError, match="expected some of gate, q"):
        settings(base, lora={"targets": ["q", "q"]})
    for changes in ({"parallel": "fsdp"}, {"parallel": "hsdp"}, {"shard_size": 2}):
        with pytest.raises(ConfigError, match="use parallel=ddp or auto"):
            settings(base, **changes)
    with pytest.raises(ConfigError, match="one stack is H"):
        shape = {"preset": "test", "architecture": "ut"}
        settings(base, model=shape, bp_first=2, bp_last=2, lora={"stacks": "L"})
