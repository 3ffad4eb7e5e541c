"""Sampling at full size: time and memory for 100 million rows, and for 20 GB of tokens.

    python benchmarks/data_sample.py rows     # 5,000 strata taken whole, 4 epochs; 25 GB of disk
    python benchmarks/data_sample.py mixture  # the same with caps, repeats and budgets
    python benchmarks/data_sample.py tokens   # 20 GB of tokens laid end to end; 25 GB of disk

The strata are synthetic. Many are hard links to the same few files: reading them costs what reading
costs when the page cache holds the input. Memory is that of the sampling process: RssAnon is what
it holds, RssFile are mapped pages of files, which the kernel takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import write_result

from hrmtext.data.arrays import save_array
from hrmtext.data.format import INDEX_NAMES

CHILD = """
import json, sys
from hrmtext.config.base import build
from hrmtext.config.data import SamplingConfig
from hrmtext.data.sample import sample
report = sample(sys.argv[1], sys.argv[2], build(SamplingConfig, json.loads(sys.argv[3]), where="-"))
print(json.dumps([report.epoch_rows, report.epoch_tokens]))
"""


def make_template(folder: Path, num_rows: int, num_tokens: int, seed: int) -> None:
    """A stratum of `num_rows` rows of about 135 tokens that lie anywhere in `num_tokens` tokens."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with_tokens = generator.integers(0, 65_536, min(num_tokens, 1 << 20), dtype=np.uint32)
    save_array(folder / "tokens.npy", np.resize(with_tokens, num_tokens))
    lengths = np.exp(generator.normal(np.log(67) - 0.5, 1.0, size=(2, num_rows)))
    lengths = lengths.astype(np.uint64).clip(2, 2_000)
    starts = generator.integers(0, num_tokens - 4_000, num_rows, dtype=np.uint64)
    columns = (starts, lengths[0], starts + lengths[0], lengths[1])
    for name, values in zip(INDEX_NAMES, columns, strict=True):
        save_array(folder / f"{name}.npy", values)
    (folder / "metadata.json").write_text('{"source_mtime": 1, "source_size": 2}')


def make_strata(root: Path, num_strata: int, num_rows: int, num_tokens: int, templates: int) -> int:
    """`num_strata` strata with `num_rows` rows in all; returns the rows made."""
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.normal(0, 1.0, templates))
    per_template = num_strata // templates
    sizes = np.maximum(1, sizes / sizes.sum() * num_rows / per_template).astype(int)
    sizes[-1] += num_rows // per_template - int(sizes.sum())
    for number, size in enumerate(sizes.tolist()):
        make_template(root / ".templates" / str(number), size, num_tokens, number)
        for copy in range(per_template):
            folder = root / f"stratum_{number:03}_{copy:03}"
            folder.mkdir()
            for file in (root / ".templates" / str(number)).iterdir():
                os.link(file, folder / file.name)
    (root / "tokenizer_info.json").write_text('{"vocab_size": 65536}')
    return int(sizes.sum()) * per_template


def run(tokenized: Path, out: Path, config: dict[str, object]) -> dict[str, object]:
    """Sample in a process of its own, watching its memory."""
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, str(tokenized), str(out), json.dumps(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        for line in status.splitlines():
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]))
        time.sleep(0.02)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"sampling failed with status {process.returncode}")
    rows, tokens = json.loads(output)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "config": config,
        "seconds": round(time.perf_counter() - start, 1),
        "user_s": round(used.ru_utime, 1),
        "system_s": round(used.ru_stime, 1),
        "peak_anonymous_mib": round(peaks["RssAnon"] / 1024),
        "peak_mapped_files_mib": round(peaks["RssFile"] / 1024),
        "peak_resident_mib": round(peaks["VmHWM"] / 1024),
        "epoch_rows": rows,
        "epoch_tokens": tokens,
        "tokens_file_bytes": (out / "tokens.npy").stat().st_size,
        "cores": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    """Make the strata, sample them, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["rows", "mixture", "tokens"])
    parser.add_argument("--scale", type=float, default=1.0, help="part of the full size")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        tokenized = work / "tokenized"
        config: dict[str, object] = {"epochs": 4}
        if args.what == "tokens":
            config = {"epochs": 1}
            num_rows = make_strata(tokenized, 40, 40_000, int(250_000_000 * args.scale), 1)
        else:
            num_rows = make_strata(tokenized, 5_000, int(100_000_000 * args.scale), 8_192, 100)
        if args.what == "mixture":
            config["total_tokens"] = int(4e9 * args.scale)
            config["rules"] = [
                {"prefix": "stratum_00", "max_rows": 5_000},
                {"prefix": "stratum_01", "repeat": 3},
                {"prefix": "stratum_02", "share": 0.6},
                {"prefix": "stratum_03", "share": 0.4},
                {"prefix": "stratum_04", "tokens": int(1e9 * args.scale)},
            ]
        values = run(tokenized, work / "sampled", config)
        values = {"scale": args.scale, "strata_rows": num_rows, **values}
        write_result(f"data_sample_{args.what}", torch.device("cpu"), values)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
