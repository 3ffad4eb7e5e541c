"""A few real steps, to measure how fast they are here."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING

import torch

from hrmtext.batch import PackedBatch, RowLayout
from hrmtext.config.model import ModelConfig
from hrmtext.config.train import TrainConfig
from hrmtext.data.loader import GlobalBatch
from hrmtext.model import build_model
from hrmtext.runtime.device import pick_training_dtype
from hrmtext.runtime.rng import numpy_generator
from hrmtext.train.lora import add_adapters, parameter_groups
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.precision import ComputeModel
from hrmtext.train.schedule import depth_with
from hrmtext.train.step import TrainStep

if TYPE_CHECKING:
    from hrmtext.train.source import DataSource

PROBE_STEPS = 3
PROBE_SECONDS = 1.0
"""Steps that are timed at least, and how long short ones are timed on."""
TYPICAL_ROW_TOKENS = 135
"""Mean length of a row of the published corpus, assumed where the rows are not known."""
TYPICAL_HEAD_SHARE = 0.3
"""Share of tokens that bear loss, assumed where the rows are not known."""
PROBE_BATCHES = 8
"""Batches of a run's own data that are trained on in turn: their shapes differ a little."""


def measure_speed(
    config: TrainConfig, model: ModelConfig, device: torch.device, source: DataSource | None = None
) -> float:
    """Tokens a second of a few real optimizer steps at full depth.

    Args:
        source: the data whose first batches are trained on; None: random rows.
    """
    dtype = pick_training_dtype(config.precision, device)
    master = build_model(model, seed=0, device=device)
    if config.lora is not None:
        add_adapters(master, config.lora, seed=0)
    compute = ComputeModel(master, dtype)
    optimizer = AdamAtan2(
        master.parameters() if config.lora is None else parameter_groups(master, config.lora),
        lr=config.lr,
        ema_decay=config.ema_decay,
        kernel=config.optimizer_kernel,
    )
    step = TrainStep(compute, optimizer, config, device)
    if source is None:
        batches = [random_batch(config, model)]
    else:
        batches = list(itertools.islice(source.loader(config, 0, 1), PROBE_BATCHES))
    depth = depth_with(1, config, model, 1, model.H_cycles)
    times: list[float] = []
    rates: list[float] = []
    while len(times) <= PROBE_STEPS or sum(times[1:]) < PROBE_SECONDS:
        batch = batches[len(times) % len(batches)]
        start = time.perf_counter()
        step.run(batch, depth=depth, lr=0.0, step=len(times))  # the guard waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        rates.append(batch.num_tokens / times[-1])
    return statistics.median(rates[1:])


def random_batch(config: TrainConfig, model: ModelConfig) -> GlobalBatch:
    """A step of full bins of rows of typical length, a third of each supervised."""
    generator = numpy_generator(config.seed, "probe")
    length = min(TYPICAL_ROW_TOKENS, model.max_seq_len, config.bin_size)
    prompt = max(1, round(length * (1 - TYPICAL_HEAD_SHARE)))
    bins = []
    for _ in range(max(1, config.batch_tokens // config.bin_size)):
        num_rows = max(1, config.bin_size // length)
        used = num_rows * length
        size = config.bin_size if config.pad_bins else used
        tokens = torch.from_numpy(generator.integers(0, model.vocab_size, size))
        position = torch.arange(used) % length
        labels = torch.full((size,), -100)
        supervised = (position >= prompt - 1).nonzero().squeeze(1)
        labels[supervised] = tokens[supervised]
        prefix = prompt if model.prefix_lm else 0
        layout = RowLayout.from_prefixes([length] * num_rows, [prefix] * num_rows, size)
        positions = torch.cat((position, torch.arange(size - used)))
        bins.append(PackedBatch(tokens=tokens, labels=labels, positions=positions, layout=layout))
    return GlobalBatch(
        index=0,
        epoch=0,
        bins=bins,
        num_supervised_tokens=sum(int((b.labels != -100).sum()) for b in bins),
        num_tokens=sum(sum(b.layout.lengths) for b in bins),
    )
