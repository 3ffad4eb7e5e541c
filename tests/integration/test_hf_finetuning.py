"""Trainer, PEFT and TRL on an exported model: held-out answers get right that were wrong before."""

import pytest
import torch
import transformers
from hf_tiny_run import exact_match, next_rows, write_jsonl

import hrmtext
import hrmtext.hf as hf
from hrmtext.hf import PrefixLMCollator, format_prompt
from hrmtext.hf.configuration import VARLEN

datasets = pytest.importorskip("datasets", reason="needs the package datasets")
pytestmark = [
    # These packages warn about one another's and torch's coming changes.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]

CLASSES = {"transformers": transformers.AutoModelForCausalLM, "ours": hf.HrmTextForCausalLM}
LORA_TARGETS = {
    "transformers": [
        "gate_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj",
    ],
    "ours": ["gqkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}  # fmt: skip
FULL, LORA = (70, 3e-3), (90, 1e-2)
"""Steps and learning rate: a sixth more steps than are enough."""
EACH = pytest.mark.parametrize("kind", list(CLASSES))


@pytest.fixture
def data(tmp_path):
    """The training rows as `load_dataset` reads a JSONL file, and the held-out rows."""
    train, held_out = next_rows()
    file = write_jsonl(tmp_path / "next.jsonl", train)
    loaded = datasets.load_dataset("json", data_files=str(file), cache_dir=str(tmp_path / "cache"))
    return loaded["train"], held_out


def settings(folder, steps, rate, **changes):
    values = {
        "output_dir": str(folder), "max_steps": steps, "learning_rate": rate,
        "per_device_train_batch_size": 32, "remove_unused_columns": False, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip
    return values | changes


def loaded(kind, folder):
    return CLASSES[kind].from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@EACH
def test_trainer_learns_a_new_task_from_jsonl_and_what_it_saves_loads_everywhere(
    exported, data, tmp_path, kind
):
    rows, held_out = data
    model, tokenizer = loaded(kind, exported)
    before = exact_match(model, tokenizer, held_out)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings(tmp_path / "out", *FULL)),
        train_dataset=rows,
        data_collator=PrefixLMCollator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    after = exact_match(model, tokenizer, held_out)
    assert before <= 0.1 and after >= 0.9, (before, after)
    assert trainer.evaluate(held_out)["eval_loss"] < 0.2
    trainer.save_model(str(tmp_path / "saved"))
    for other in CLASSES:
        assert exact_match(*loaded(other, tmp_path / "saved"), held_out) == after
    answers = hrmtext.load(tmp_path / "saved", device="cpu", dtype="fp32").generate(
        [row["instruction"] for row in held_out]
    )
    right = sum(a == row["response"] for a, row in zip(answers, held_out, strict=True))
    assert right / len(held_out) == after


def losses(exported, rows, tmp_path, implementation, packed, **changes):
    """Loss of every step of a short fine-tuning."""
    model, tokenizer = loaded("ours", exported)
    model.set_attn_implementation(implementation)
    changes = {"logging_strategy": "steps", "logging_steps": 1, **changes}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings(tmp_path / "out", 5, 1e-3, **changes)),
        train_dataset=rows,
        data_collator=PrefixLMCollator(tokenizer, pack_for=model if packed else None),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_packing_accumulation_checkpointing_and_every_implementation_train_alike(
    exported, data, tmp_path
):
    rows, _ = data
    expected = losses(exported, rows, tmp_path, "sdpa", packed=False)
    assert len(expected) == 5 and expected[-1] < expected[0]
    for implementation, packed, changes in (
        ("sdpa", True, {}),
        (VARLEN, True, {}),
        ("eager", False, {}),
        ("sdpa", False, {"gradient_checkpointing": True}),
        (
            "sdpa",
            False,
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
        ),
    ):
        found = losses(exported, rows, tmp_path, implementation, packed, **changes)
        assert found == pytest.approx(expected, rel=2e-3), (implementation, packed, changes)


@EACH
def test_a_lora_fine_tune_learns_saves_loads_and_merges(exported, data, tmp_path, kind):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    rows, held_out = data
    model, tokenizer = loaded(kind, exported)
    before = exact_match(model, tokenizer, held_out)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=LORA_TARGETS[kind], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable < 0.4 * total
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings(tmp_path / "out", *LORA)),
        train_dataset=rows,
        data_collator=PrefixLMCollator(tokenizer),
    )
    trainer.train()
    after = exact_match(model, tokenizer, held_out)
    assert before <= 0.1 and after >= 0.9, (before, after)

    model.save_pretrained(tmp_path / "adapter")
    base, _ = loaded(kind, exported)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = PrefixLMCollator(tokenizer)(held_out)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert torch.equal(again(**batch).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    for other in CLASSES:
        assert exact_match(*loaded(other, tmp_path / "merged"), held_out) == after


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_trl_sft_trainer_learns_under_the_prefix_mask(exported, data, tmp_path, kind, with_lora):
    trl = pytest.importorskip("trl", reason="needs the package trl")
    peft = pytest.importorskip("peft", reason="needs the package peft")
    rows, held_out = data
    model, tokenizer = loaded(kind, exported)
    pairs = rows.map(
        lambda row: {"prompt": format_prompt(row["instruction"]), "completion": row["response"]},
        remove_columns=rows.column_names,
    )
    changes = {"max_length": 64, "remove_unused_columns": True, "gradient_checkpointing": False}
    steps, rate = LORA if with_lora else FULL
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path / "out", steps, rate, bf16=False, **changes)),
        train_dataset=pairs,
        data_collator=PrefixLMCollator(tokenizer),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=LORA_TARGETS[kind], task_type="CAUSAL_LM"
        )
        if with_lora
        else None,
    )
    # TRL's rows and ours are the same tokens, marks and labels.
    first = PrefixLMCollator(tokenizer)([rows[0]])
    prepared = PrefixLMCollator(tokenizer)([trainer.train_dataset[0]])
    for name, tensor in first.items():
        assert torch.equal(tensor, prepared[name]), name
    trainer.train()
    after = exact_match(trainer.model, tokenizer, held_out)
    assert after >= 0.9, after
