"""A prepared data folder of additions, and a recipe that learns them in seconds."""

import json
import random

from hrmtext.config.base import build
from hrmtext.config.data import DataConfig
from hrmtext.config.train import TrainConfig
from hrmtext.data.prepare import prepare


def prepare_additions(folder, num_rows=1500):
    """A prepared folder with `num_rows` rows, 60 of them held out."""
    generator = random.Random(1)
    rows = []
    for _ in range(num_rows):
        a, b = generator.randrange(40), generator.randrange(40)
        rows.append({"instruction": f"{a}+{b}=", "response": f"{a + b}"})
    (folder / "add.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "local": [{"path": str(folder / "add.jsonl"), "eval_size": 60}],
        "tokenizer": {"vocab_size": 287},
        "sampling": {"epochs": 2, "max_seq_len": 32, "min_response_tokens": 1},
    }
    return prepare(build(DataConfig, values, where="test"), folder / "prepared").folder


def make_config(**changes):
    values = {
        "model": {"preset": "test", "vocab_size": 287, "max_seq_len": 32},
        "epochs": 2,
        "batch_tokens": 512,
        "bin_tokens": 256,
        "lr": 3e-3,
        "warmup_steps": 5,
        "lr_min_ratio": 0.1,
        "ema_decay": 0.95,
        "precision": "fp32",
        "checkpoint_every": 10,
        "validate_every": 20,
        "log_every": 3,
        "tensorboard": True,
        **changes,
    }
    return build(TrainConfig, values, where="test")


def train_quietly(config, data, run):
    """A run on the CPU, for a process of its own."""
    from hrmtext.train import train

    train(config, data_folder=data, run_folder=run, device="cpu", progress="none")
