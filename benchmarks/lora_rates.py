"""At which learning rates does LoRA on the recurrent stacks learn, and when does it collapse?

A tiny model that copies three letters is fine-tuned by transformers' `Trainer` to give each
letter's next one instead: all weights, LoRA on both stacks, LoRA on the H stack alone; each rate
with three seeds. Scores are exact matches of greedy answers on 40 held-out words: of the new task,
and of the old one, with and without its rows in the training data. It says where the cliff is in a
model of this size, not where it is in yours.

    python benchmarks/lora_rates.py [--steps 200] [--seeds 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from common import write_result

from hrmtext.hf import HrmTextForCausalLM, PrefixLMCollator

sys.path.append(str(Path(__file__).parents[1] / "tests" / "integration"))
from hf_tiny_run import exact_match, next_rows, train_and_export

LINEARS = r"layers\.\d+\.(attn\.(gqkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))"
TARGETS = {
    "all weights": None,
    "lora, both stacks": rf".*_module\.{LINEARS}",
    "lora, H stack": rf".*H_module\.{LINEARS}",
}
RATES = {
    "all weights": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "lora, both stacks": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "lora, H stack": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
RANK, ALPHA, BATCH = 8, 16, 32


def copy_of(row: dict[str, str]) -> dict[str, str]:
    """The old task on the same word."""
    word = row["instruction"].removeprefix("next ")
    return {"instruction": f"copy {word}", "response": word}


def fine_tune(folder: Path, rows, held_out, *, side: str, rate: float, steps: int, seed: int):
    """Final loss, new task's and old task's exact match."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = HrmTextForCausalLM.from_pretrained(folder)
    if TARGETS[side] is not None:
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[side], task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder.parent / "out"), max_steps=steps, learning_rate=rate, seed=seed,
        per_device_train_batch_size=BATCH, remove_unused_columns=False, report_to=[],
        save_strategy="no", logging_steps=20, disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=PrefixLMCollator(tokenizer)
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    old = [copy_of(row) for row in held_out]
    return last, exact_match(model, tokenizer, held_out), exact_match(model, tokenizer, old)


def main() -> None:
    """Run the grid and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, held_out = next_rows()
    both_tasks = rows + [copy_of(row) for row in rows]
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = train_and_export(Path(temporary))
        grid = [(side, rate, "new task") for side, rates in RATES.items() for rate in rates]
        grid += [("all weights", 1e-3, "both tasks"), ("lora, both stacks", 3e-3, "both tasks")]
        for side, rate, data in grid:
            chosen = rows if data == "new task" else both_tasks
            found = [
                fine_tune(
                    folder, chosen, held_out, side=side, rate=rate, steps=options.steps, seed=seed
                )
                for seed in range(options.seeds)
            ]
            loss, new, old = (
                [round(value, 3) for value in values] for values in zip(*found, strict=True)
            )
            entry = {"trained": side, "rate": rate, "data": data}
            results.append(entry | {"last_loss": loss, "new_task": new, "old_task": old})
            print(results[-1], flush=True)
    settings = {"rank": RANK, "alpha": ALPHA, "batch_rows": BATCH, "steps": options.steps}
    write_result("lora_rates", torch.device("cpu"), {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
