"""Packing and loading: planning a million rows, and tokens a second to an idle consumer.

    python benchmarks/data_loader.py

Rows are synthetic, about 135 tokens long on average. Also reported: the longest wait for a batch
around an epoch's end, where the next epoch must have been planned already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import summary, write_result

from hrmtext.data.arrays import save_array
from hrmtext.data.format import INDEX_NAMES, SampledData
from hrmtext.data.loader import Loader
from hrmtext.data.pack import plan_epoch


def make_sampled(folder: Path, num_rows: int) -> int:
    """A sampled folder of two epochs, rows in random order; returns the tokens of one."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(67) - 0.5, 1.0, size=(2, num_rows)))
    lengths = lengths.astype(np.int64).clip(2, 2_000)
    ends = np.cumsum(lengths.sum(0))
    starts = ends - lengths.sum(0)
    save_array(folder / "tokens.npy", generator.integers(0, 65_536, int(ends[-1]), np.uint16))
    for epoch in range(2):
        (folder / f"epoch_{epoch}").mkdir()
        order = generator.permutation(num_rows)
        columns = (starts, lengths[0], starts + lengths[0], lengths[1])
        for name, values in zip(INDEX_NAMES, columns, strict=True):
            save_array(folder / f"epoch_{epoch}" / f"{name}.npy", values[order])
    total = int(ends[-1])
    metadata = {
        "tokenizer_info": {"vocab_size": 65_536}, "vocab_size": None, "max_seq_len": 4_097,
        "total_length": total,
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return total


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch-tokens", type=int, default=196_608)
    parser.add_argument("--bin-tokens", type=int, default=24_576)
    parser.add_argument("--prefetch", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        make_sampled(Path(work), args.rows)
        data = SampledData.open(work)
        lengths = data.epoch(0).input_lengths()
        plans = []
        for _ in range(3):
            start = time.perf_counter()
            plan = plan_epoch(lengths, args.batch_tokens, args.bin_tokens)
            plans.append(time.perf_counter() - start)
        loader = Loader(
            data, batch_tokens=args.batch_tokens, bin_tokens=args.bin_tokens, seed=0,
            prefetch=args.prefetch,
        )  # fmt: skip
        first_epoch = loader.num_batches(0)  # planned before the clock starts
        waits, tokens = [], []
        iterator = iter(loader)
        next(iterator)
        # One epoch and a little of the next one.
        for _ in range(first_epoch + 50):
            start = time.perf_counter()
            batch = next(iterator)
            waits.append(time.perf_counter() - start)
            tokens.append(batch.num_tokens)
        iterator.close()
        rates = [
            sum(tokens[at : at + 100]) / sum(waits[at : at + 100])
            for at in range(0, first_epoch - 100, 100)
        ]
    edge = waits[first_epoch - 20 : first_epoch + 20]
    values = {
        "rows": args.rows,
        "batch_tokens": args.batch_tokens,
        "bin_tokens": args.bin_tokens,
        "prefetch": args.prefetch,
        "cores": len(os.sched_getaffinity(0)),
        "plan_s": summary(plans, 3),
        "utilization": round(plan.utilization(lengths), 4),
        "tokens_per_s": summary(rates, 0),
        "whole_epoch_tokens_per_s": round(sum(tokens) / sum(waits)),
        "wait_ms": summary([1e3 * wait for wait in waits], 2),
        "longest_wait_at_the_epoch_edge_ms": round(1e3 * max(edge), 2),
        "median_wait_ms": round(1e3 * statistics.median(waits), 2),
    }
    write_result("data_loader", torch.device("cpu"), values)


if __name__ == "__main__":
    main()
