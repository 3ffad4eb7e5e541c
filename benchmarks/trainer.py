"""How fast does our training loop train against transformers' `Trainer` on its own model?

Same weights, same rows in every step, same depth of backpropagation. Ours is `hrm-text train`'s
loop over a data folder; theirs is `Trainer` with `HrmTextForCausalLM`, AdamW and padded batches
with `token_type_ids`. Each side first tries its settings; the best of each are then run in turn.
Every run is a process of its own, so that its peak memory is its own too.

    python benchmarks/trainer.py [--shape quickstart|B] [--rounds 3] [--launcher "numactl -C 0,1"]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import summary, write_result
from train_step import L_BP_CYCLES, padded, quickstart_like_rows

from hrmtext.config.base import build, to_mapping
from hrmtext.config.model import ModelConfig, preset
from hrmtext.config.train import TrainConfig
from hrmtext.data.arrays import save_array
from hrmtext.data.format import INDEX_NAMES, METADATA_FILE, TOKENS_FILE
from hrmtext.data.loader import GlobalBatch, Loader
from hrmtext.train.source import FolderSource

SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {"preset": "micro", "vocab_size": 512, "batch_tokens": 1024,
                   "trial_steps": 20, "steps": 60, "warmup_steps": 8},
    "B": {"preset": "B", "num_layers_per_stack": 1, "max_seq_len": 256, "batch_tokens": 512,
          "trial_steps": 5, "steps": 14, "warmup_steps": 2},
    "test": {"preset": "test", "max_seq_len": 256, "batch_tokens": 512,
             "trial_steps": 3, "steps": 4, "warmup_steps": 1},
}  # fmt: skip
"""Model fields over a preset, tokens a step, and how many steps are run and left out."""
SIDES = ("ours", "trainer")


def settings_of(side: str, *, with_bf16: bool) -> list[dict[str, Any]]:
    """The settings that a side tries."""
    formats = ("fp32", "bf16") if with_bf16 else ("fp32",)
    if side == "ours":
        return [
            {"precision": precision, "compile": compiled}
            for precision, compiled in itertools.product(formats, (False, True))
        ]
    return [
        {"precision": precision, "attention": attention, "compile": compiled}
        for precision, attention, compiled in itertools.product(
            formats, ("sdpa", "eager"), (False, True)
        )
    ]


def model_config(shape: dict[str, Any]) -> ModelConfig:
    """The model of a shape."""
    run_keys = {"preset", "batch_tokens", "trial_steps", "steps", "warmup_steps"}
    return preset(shape["preset"], **{k: v for k, v in shape.items() if k not in run_keys})


def write_rows(folder: Path, config: ModelConfig, num_tokens: int) -> None:
    """A sampled data folder, in the public pipeline's form, of random rows."""
    rows = quickstart_like_rows(num_tokens, config.vocab_size, seed=0)
    random.Random(1).shuffle(rows)
    flat = [token for prompt, response in rows for token in (*prompt, *response)]
    prompts = np.array([len(prompt) for prompt, _ in rows])
    responses = np.array([len(response) for _, response in rows])
    starts = np.cumsum(prompts + responses) - prompts - responses
    save_array(folder / TOKENS_FILE, np.array(flat, dtype=np.int32))
    (folder / "epoch_0").mkdir()
    arrays = (starts, prompts, starts + prompts, responses)
    for name, array in zip(INDEX_NAMES, arrays, strict=True):
        save_array(folder / "epoch_0" / f"{name}.npy", array.astype(np.int64))
    metadata = {
        "tokenizer_info": {"vocab_size": config.vocab_size},
        "max_seq_len": config.max_seq_len + 1,
        "total_length": len(flat),
    }
    (folder / METADATA_FILE).write_text(json.dumps(metadata))


class TimedLoader:
    """The loader of a run, noting when each step's batch is asked for and how large it is."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.times: list[float] = []
        self.tokens: list[int] = []

    def __iter__(self) -> Iterator[GlobalBatch]:
        batches = iter(self.loader)
        while True:
            self.times.append(time.perf_counter())
            batch = next(batches)
            self.tokens.append(batch.num_tokens)
            yield batch

    def state(self) -> dict[str, Any]:
        return self.loader.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.loader.restore(state)


class TimedSource(FolderSource):
    """A data folder whose loader is timed."""

    timed: TimedLoader

    def loader(self, config: TrainConfig, rank: int, world_size: int) -> Any:
        self.timed = TimedLoader(super().loader(config, rank, world_size))
        return self.timed


def train_config(config: ModelConfig, batch_tokens: int, steps: int, **changes: Any) -> TrainConfig:
    """Our recipe for a run of the benchmark."""
    values = {
        "model": to_mapping(config), "batch_tokens": batch_tokens, "max_steps": steps,
        "epochs": 1_000, "lr": 1e-4, "warmup_steps": 0, "ema_decay": 0.99, "pad_bins": True,
        "L_bp_cycles": list(L_BP_CYCLES), "checkpoint_every": 10**9, "validate_every": 0,
        "validation_rows": 0, "tensorboard": False, **changes,
    }  # fmt: skip
    return build(TrainConfig, values, where="benchmark")


def run_ours(data: Path, shape: dict[str, Any], steps: int, setting: dict[str, Any]) -> list[float]:
    """When each step began, and when the last one ended."""
    from hrmtext.train.loop import train_on

    source = TimedSource(data)
    config = train_config(model_config(shape), shape["batch_tokens"], steps + 1, **setting)
    with tempfile.TemporaryDirectory() as folder:
        train_on(config, source, run_folder=Path(folder) / "run", device="cpu", progress="none")
    return source.timed.times[: steps + 1]


def steps_of_rows(data: Path, shape: dict[str, Any], steps: int) -> list[list[Any]]:
    """The rows of every step, as our loader hands them out."""
    source = FolderSource(data)
    config = train_config(model_config(shape), shape["batch_tokens"], steps)
    index = source.data.epoch(0)
    tokens = source.data.tokens
    found = []
    for batch in itertools.islice(iter(source.loader(config, 0, 1)), steps):
        ids = [row for packed in batch.bins for row in packed.row_ids]
        found.append(
            [
                (tokens[a : a + b].tolist(), tokens[c : c + d].tolist())
                for a, b, c, d in zip(*index.take(np.array(ids)), strict=True)
            ]
        )
    return found


def run_trainer(
    data: Path, shape: dict[str, Any], steps: int, setting: dict[str, Any]
) -> list[float]:
    """When each of `Trainer`'s steps began, and when the last one ended."""
    import transformers

    from hrmtext.artifacts.hf_folder import to_hf_config, to_split
    from hrmtext.model import build_model

    transformers.logging.set_verbosity_error()
    config = model_config(shape)
    values = {**to_hf_config(config), "L_bp_cycles": list(L_BP_CYCLES), "use_cache": False}
    values.pop("model_type", None), values.pop("architectures", None)
    model = transformers.HrmTextForCausalLM._from_config(
        transformers.HrmTextConfig(**values), attn_implementation=setting["attention"]
    )
    model.load_state_dict(to_split(build_model(config, seed=0).state_dict()))
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    rows = steps_of_rows(data, shape, steps + 1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=steps + 1, per_device_train_batch_size=1,
            learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.1,
            remove_unused_columns=False, report_to=[], save_strategy="no", logging_steps=10,
            disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=0, max_grad_norm=0.0,
            bf16=setting["precision"] == "bf16", torch_compile=setting["compile"],
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"rows": step} for step in rows],  # pyrefly: ignore[bad-argument-type]
            data_collator=lambda items: padded(items[0]["rows"], torch.device("cpu")),
            callbacks=[Clock()],
        )
        trainer.train()
    return times[: steps + 1]


def first_loss(side: str, data: Path, shape: dict[str, Any]) -> float:
    """Loss of the first step's rows at the initial weights, in fp32: both sides' must agree."""
    from hrmtext.artifacts.hf_folder import to_hf_config, to_split
    from hrmtext.batch import PackedBatch
    from hrmtext.model import build_model
    from hrmtext.train.loss import Microbatch, forward_loss

    config = model_config(shape)
    rows = steps_of_rows(data, shape, 1)[0][:8]
    ours = build_model(config, seed=0)
    with torch.no_grad():
        if side == "ours":
            micro = Microbatch.prepare(
                PackedBatch.from_rows(rows), device=torch.device("cpu"), dtype=torch.float32
            )
            scale = 1 / len(micro.labels)
            return float(
                forward_loss(ours, micro, depth=None, scale=scale, chunk_bytes=1 << 28).total
            )
        from transformers import HrmTextConfig, HrmTextForCausalLM

        values = to_hf_config(config)
        values.pop("model_type", None), values.pop("architectures", None)
        theirs = HrmTextForCausalLM(HrmTextConfig(**values)).eval()
        theirs.load_state_dict(to_split(ours.state_dict()))
        return float(theirs(**padded(rows, torch.device("cpu")), use_cache=False).loss)


def child(arguments: argparse.Namespace) -> None:
    """One run; prints seconds by step, tokens by step and the peak memory as JSON."""
    shape = SHAPES[arguments.shape]
    data, setting = Path(arguments.data), json.loads(arguments.setting)
    run = {"ours": run_ours, "trainer": run_trainer}[arguments.child]
    times = run(data, shape, arguments.steps, setting)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"seconds": np.diff(times).tolist(), "peak_bytes": peak}))


class Runner:
    """Starts the runs and turns their times into tokens a second."""

    def __init__(self, arguments: argparse.Namespace, data: Path) -> None:
        self.launcher = shlex.split(arguments.launcher)
        self.shape_name, self.shape, self.data = arguments.shape, SHAPES[arguments.shape], data
        steps = max(self.shape["steps"], self.shape["trial_steps"])
        rows = steps_of_rows(data, self.shape, steps)
        self.tokens = [sum(len(p) + len(r) - 1 for p, r in step) for step in rows]
        widths = [max(len(p) + len(r) for p, r in step) for step in rows]
        self.padded_share = sum(self.tokens) / sum(
            width * len(step) for width, step in zip(widths, rows, strict=True)
        )

    def run(self, side: str, setting: dict[str, Any], steps: int) -> dict[str, Any]:
        """Tokens a second of every step behind the warmup, and the peak memory."""
        command = [
            *self.launcher, sys.executable, __file__, "--child", side, "--shape", self.shape_name,
            "--data", str(self.data), "--setting", json.dumps(setting), "--steps", str(steps),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{side} with {setting} failed:\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        skip = self.shape["warmup_steps"]
        # A step is counted by its own tokens; the median leaves out a rare recompilation.
        rates = [n / s for n, s in zip(self.tokens, found["seconds"], strict=False)][skip:]
        rate = statistics.median(rates)
        print(f"{side} {setting}: {rate:,.0f} tokens/s, {found['peak_bytes'] / 2**20:,.0f} MiB",
              file=sys.stderr)  # fmt: skip
        return {"rate": rate, "rates": rates, "peak_bytes": found["peak_bytes"]}


def main() -> None:
    """Measure and write results/trainer_<shape>-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="quickstart")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", choices=("auto", "yes", "no"), default="auto",
                        help="try bf16 too; auto: where the processor has it")  # fmt: skip
    for side in SIDES:
        parser.add_argument(f"--{side}", help="JSON of its setting, instead of trying all")
    parser.add_argument("--launcher", default="", help="command that starts every run")
    for hidden in ("--child", "--data", "--setting"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    from hrmtext.runtime.device import cpu_has_bf16

    with_bf16 = arguments.bf16 == "yes" or (arguments.bf16 == "auto" and cpu_has_bf16())
    shape = SHAPES[arguments.shape]
    config = model_config(shape)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_rows(data, config, num_tokens=shape["batch_tokens"] * (shape["steps"] + 4))
        losses = {side: round(first_loss(side, data, shape), 5) for side in SIDES}
        runner = Runner(arguments, data)
        trials: dict[str, dict[str, float]] = {}
        best: dict[str, dict[str, Any]] = {}
        for side in SIDES:
            settings = settings_of(side, with_bf16=with_bf16)
            if chosen := getattr(arguments, side):
                best[side] = {**settings[0], **json.loads(chosen)}
                continue
            results = {
                json.dumps(setting): runner.run(side, setting, shape["trial_steps"])["rate"]
                for setting in settings
            }
            trials[side] = {name: round(rate, 1) for name, rate in results.items()}
            best[side] = json.loads(max(results, key=results.__getitem__))
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                rounds[side].append(runner.run(side, best[side], shape["steps"]))
    pairs = [
        ours["rate"] / theirs["rate"]
        for ours, theirs in zip(rounds["ours"], rounds["trainer"], strict=True)
    ]
    write_result(
        f"trainer_{arguments.shape}",
        torch.device("cpu"),
        {
            "shape": {**shape, "parameters": sum(p.numel() for p in _parameters(config))},
            "L_bp_cycles": list(L_BP_CYCLES),
            "tokens_a_step": summary([float(n) for n in runner.tokens]),
            "real_share_of_their_padded_tokens": round(runner.padded_share, 3),
            "first_loss": losses,
            "processor_has_bf16": cpu_has_bf16(),
            "trial_tokens_per_s": trials,
            "best_setting": best,
            "tokens_per_s": {
                side: summary([rate for one in runs for rate in one["rates"]])
                for side, runs in rounds.items()
            },
            "times_faster": {
                "median": round(statistics.median(pairs), 2),
                "by_round": [round(pair, 2) for pair in pairs],
            },
            "peak_mib": {
                side: round(max(one["peak_bytes"] for one in runs) / 2**20)
                for side, runs in rounds.items()
            },
        },
    )


def _parameters(config: ModelConfig) -> Iterator[torch.nn.Parameter]:
    from hrmtext.model import empty_model

    return empty_model(config, device="meta").parameters()


if __name__ == "__main__":
    main()
