"""Fine-tuning a small model for a family it never saw: all weights against adapters.

The base is the quickstart's model, trained by its recipe on all of its families but one (or is
given: any model folder with the data that it was trained on). The family left out is learnt by all
weights and by LoRA, on its rows alone and with the base's rows mixed in. Asked before and after:
exact match of greedy answers on held-out rows of the new family, and what was forgotten on the
base's own. Every result is exported and run by plain transformers, whose answers must be the same.

    python benchmarks/finetune.py --work FOLDER [--base MODEL --base-data DATA] [--steps 300]

Interrupted, the same command goes on; `--only` runs one variant.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import write_result

import hrmtext
from hrmtext.api import TextModel
from hrmtext.artifacts.layout import RunFolder
from hrmtext.config.base import build, read_yaml
from hrmtext.config.data import DataConfig
from hrmtext.config.evaluate import EvaluateConfig
from hrmtext.config.train import TrainConfig
from hrmtext.convert import export_hf
from hrmtext.data.example import HeldOutRow
from hrmtext.data.heldout import read_held_out
from hrmtext.data.prepare import prepare
from hrmtext.evaluate import run as evaluation
from hrmtext.runtime.io import write_json
from hrmtext.train import train
from hrmtext.train.metrics import read_metrics
from hrmtext.train.start import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = read_yaml(CONFIGS / "data" / "quickstart.yaml")
FAMILIES = QUICKSTART["reasoning_gym"]["families"]
NEW = [{**f, "size": 12_000} for f in FAMILIES if f["name"] == "spell_backward"]
OLD = [f for f in FAMILIES if f["name"] != "spell_backward"]
MIXTURE = [{"prefix": f.get("label", f["name"]), "max_rows": 1_500} for f in OLD]
TOKENIZER = QUICKSTART["tokenizer"]
HELD_OUT = 100
BASE = {
    **read_yaml(CONFIGS / "train" / "quickstart.yaml"), "max_steps": 1_000, "ema_decay": 0.98,
    "tensorboard": False,
}  # fmt: skip
TUNE = {
    "epochs": 4, "batch_tokens": 1_024, "warmup_steps": 10, "lr_min_ratio": 0.1,
    "ema_decay": 0.97, "bp_first": 5, "bp_last": 5, "validate_every": 0, "validation_rows": 100,
    "tensorboard": False, "checkpoint_every": 1_000,
}  # fmt: skip
LORA = {"rank": 8, "alpha": 16.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "all weights": {"data": "new", "lr": 2e-3},
    "lora": {"data": "new", "lr": 1.2e-2, "lora": LORA},
    "all weights, old rows mixed in": {"data": "mixed", "lr": 2e-3},
    "lora, old rows mixed in": {"data": "mixed", "lr": 1.2e-2, "lora": LORA},
}


def prepared(
    folder: Path,
    families: list[dict[str, Any]],
    tokenizer: dict[str, Any],
    rules: list[dict[str, Any]] | None = None,
) -> Path:
    """A data folder of some families; what is up to date in it is not made again."""
    values = {
        "reasoning_gym": {"seed": 0, "eval_size": HELD_OUT, "families": families},
        "tokenizer": tokenizer,
        "sampling": {"epochs": 4, "max_seq_len": 128, "rules": rules or []},
    }
    return prepare(build(DataConfig, values, where="benchmark"), folder).folder


def answers(model: TextModel, data: Path) -> dict[str, float]:
    """Exact match by family on held-out rows."""
    report = evaluation.evaluate(
        model, read_held_out(data / "heldout"), EvaluateConfig(max_new_tokens=32)
    )
    return {family.name: round(family.exact_match, 3) for family in report.families}


def plain_transformers(folder: Path, model: TextModel, rows: list[HeldOutRow]) -> float:
    """Share of prompts to which transformers, from the folder alone, answers as `model` does."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same = 0
    ours = sample(model, rows)
    for row, answer in zip(rows, ours, strict=True):
        ids = model.tokenizer.encode_prompt(row.instruction, row.condition)
        out = theirs.generate(
            input_ids=torch.tensor([ids]), token_type_ids=torch.ones(1, len(ids), dtype=torch.long),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=16, do_sample=False,
        )  # fmt: skip
        text = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        same += text == answer
    return same / len(rows)


def base_model(work: Path, old: Path) -> Path:
    """The base as a Hugging Face folder; trained first where it is not there."""
    if not (work / "base").exists():
        result = train(
            build(TrainConfig, BASE, where="base"), data_folder=old, run_folder=work / "base-run"
        )
        export_hf(result.run_folder, work / "base")
    return work / "base"


def tune(work: Path, name: str, base: Path, folders: dict[str, Path], steps: int) -> None:
    """Train, ask and export one variant; its result is a file of its own."""
    place = work / name.replace(", ", "-").replace(" ", "_")
    if (place / "result.json").exists():
        return
    variant = dict(VARIANTS[name])
    data = folders[variant.pop("data")]
    settings = {**TUNE, **variant, "init_from": str(base), "max_steps": steps}
    settings["forgetting"] = {"data": str(folders["old"]), "rows": 2 * HELD_OUT}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    result = train(load_config(None, overrides), data_folder=data, run_folder=place / "run")
    model = hrmtext.load(place / "run", dtype="fp32")
    export_hf(place / "run", place / "export", replace=True)
    asked = read_held_out(folders["new"] / "heldout")[:40]
    files = [file for file in result.checkpoint.iterdir() if file.suffix == ".safetensors"]
    logged = read_metrics(RunFolder(place / "run").metrics_file)
    last = [line for line in logged if line["kind"] == "forgetting"][-1]
    write_json(
        place / "result.json",
        {
            "variant": name,
            "lr": settings["lr"],
            "trained_rows": data.name,
            "new_family": answers(model, folders["new"]),
            "old_families": answers(model, folders["old"]),
            "forgetting": {"before": last["before"], "after": last["after"]},
            "same_answers_in_transformers": plain_transformers(place / "export", model, asked),
            "checkpoint_mb": round(sum(f.stat().st_size for f in files) / 1e6, 2),
            "trained_parameters": trained_parameters(settings, model),
            "seconds": round(result.elapsed_s, 1),
        },
    )
    print((place / "result.json").read_text(), flush=True)


def sample(model: TextModel, rows: list[HeldOutRow]) -> list[str]:
    """Greedy answers."""
    prompts, conditions = [r.instruction for r in rows], [r.condition for r in rows]
    return model.generate(prompts, conditions, max_new_tokens=16)


def trained_parameters(settings: dict[str, Any], model: TextModel) -> int:
    """Weights that the optimizer updates."""
    from hrmtext.config.finetune import LoraConfig
    from hrmtext.model.flops import count_parameters
    from hrmtext.train.lora import count_adapters

    if "lora" not in settings:
        return count_parameters(model.config).stored
    return count_adapters(model.config, build(LoraConfig, settings["lora"], where="lora"))


def main() -> None:
    """Run what is not there yet, and write the result once all of it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs, made if absent")
    parser.add_argument("--base", type=Path, help="model folder, an exported quickstart say")
    parser.add_argument("--base-data", type=Path, help="the data that --base was trained on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", choices=list(VARIANTS))
    options = parser.parse_args()
    work = options.work
    if (options.base is None) != (options.base_data is None):
        parser.error("--base and --base-data go together")
    old = options.base_data or prepared(work / "old-data", OLD, TOKENIZER)
    base = options.base or base_model(work, old)
    same_tokenizer = {"path": str(base)}
    folders = {
        "old": old,
        "new": prepared(work / "new-data", NEW, same_tokenizer),
        "mixed": prepared(work / "mixed-data", NEW + OLD, same_tokenizer, MIXTURE),
    }
    before = work / "before.json"
    if not before.exists():
        model = hrmtext.load(base, dtype="fp32")
        scores = {"new_family": answers(model, folders["new"]), "old_families": answers(model, old)}
        write_json(before, scores)
        print(before.read_text(), flush=True)
    names = [options.only] if options.only else list(VARIANTS)
    for name in names:
        tune(work, name, base, folders, options.steps)
    results = [json.loads(file.read_text()) for file in sorted(work.glob("*/result.json"))]
    if len(results) == len(VARIANTS):
        values = {
            "settings": {"steps": options.steps, "lora": LORA, "held_out_rows_a_family": HELD_OUT,
                         "base": BASE if options.base is None else "given", "fine_tuning": TUNE},
            "before": json.loads(before.read_text()),
            "results": results,
        }  # fmt: skip
        write_result("finetune", torch.device("cpu"), values)


if __name__ == "__main__":
    main()
