"""What share of the matmul rate does a training step reach, and where does the rest go?

One step of ours (packed rows, Adam-atan2 with EMA) at full depth on rows of the real mixture's
lengths, beside transformers' own model with padded rows and torch's fused AdamW in the same run.
Written for one GPU and size XL; the same script runs on a CPU at a small size.

    python benchmarks/train_gpu.py [--preset XL] [--bin-tokens 6144] [--bins 2] [--rounds 5]
    python benchmarks/train_gpu.py --device cpu --preset micro --bin-tokens 1024 --bins 1
"""

from __future__ import annotations

import argparse
import math
import random
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleave, matmul_flops, ratios, summary, synchronize, write_result
from train_step import L_BP_CYCLES, Rows, padded

from hrmtext.batch import IGNORE, PackedBatch
from hrmtext.config.base import build, to_mapping
from hrmtext.config.model import ModelConfig, preset
from hrmtext.config.train import TrainConfig
from hrmtext.data.loader import GlobalBatch
from hrmtext.model import Depth, build_model
from hrmtext.model.flops import training_flops
from hrmtext.runtime.compile import compile_blocks
from hrmtext.runtime.device import DTYPES, pick_device, pick_training_dtype
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.precision import ComputeModel
from hrmtext.train.step import TrainStep

SOURCES = (
    # share of rows, median prompt, median response, spread of both (sigma of the logarithm)
    (0.55, 160, 24, 0.8),
    (0.20, 60, 300, 0.7),
    (0.20, 90, 12, 0.6),
    (0.05, 120, 700, 0.6),
)
"""Instructions with short answers; rewritten knowledge; symbolic tasks; long solutions."""
KERNEL_KINDS = {
    "matmul": ("gemm", "matmul", "cutlass", "cublas", "nvjet", "aten::mm", "aten::addmm",
               "aten::bmm", "aten::baddbmm"),
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax_forward", "softmax_backward",
                  "aten::_softmax"),
    "optimizer": ("atan2", "multi_tensor", "foreach", "fused_adam", "lerp"),
}  # fmt: skip
"""Parts of kernel names by kind; what is in none of them is elementwise work and copies."""


def mixture_rows(num_tokens: int, config: ModelConfig, seed: int) -> Rows:
    """Rows of the mixture's lengths, of at most `num_tokens` input tokens together."""
    rng = random.Random(seed)
    rows: Rows = []
    used = 0
    longest = min(config.max_seq_len, num_tokens)
    while used < 0.97 * num_tokens:
        _, prompt, response, sigma = rng.choices(SOURCES, [source[0] for source in SOURCES])[0]
        lengths = [
            max(2, round(math.exp(rng.gauss(math.log(middle), sigma))))
            for middle in (prompt, response)
        ]
        room = min(longest, num_tokens - used + 1)
        lengths[0] = min(lengths[0], room - 2)
        lengths[1] = min(lengths[1], room - lengths[0])
        used += sum(lengths) - 1
        rows.append(
            tuple([rng.randrange(32, config.vocab_size) for _ in range(n)] for n in lengths)  # pyrefly: ignore[bad-argument-type]
        )
    return rows


def our_step(
    config: ModelConfig, bins: list[Rows], bin_tokens: int, device: torch.device,
    dtype: torch.dtype, choices: dict[str, Any],
) -> Callable[[], float]:  # fmt: skip
    """One optimizer step of ours; returns the loss."""
    values = {
        "model": to_mapping(config), "batch_tokens": bin_tokens * len(bins),
        "bin_tokens": bin_tokens, "L_bp_cycles": list(L_BP_CYCLES), "pad_bins": True, **choices,
    }  # fmt: skip
    train = build(TrainConfig, values, where="benchmark")
    model = build_model(config, seed=0, device=device)
    optimizer = AdamAtan2(model.parameters(), lr=1e-4, kernel=train.optimizer_kernel)
    compute = ComputeModel(model, dtype)
    compile_blocks(compute.module, train.compile, device=device)
    step = TrainStep(compute, optimizer, train, device)
    packed = [PackedBatch.from_rows(rows, num_tokens=bin_tokens) for rows in bins]
    batch = GlobalBatch(
        index=0,
        epoch=0,
        bins=packed,
        num_supervised_tokens=sum(len(one.supervised()) for one in packed),
        num_tokens=sum(sum(one.layout.lengths) for one in packed),
    )
    depth = Depth.from_L_bp_cycles(config, L_BP_CYCLES)

    def run() -> float:
        result = step.run(batch, depth=depth, lr=1e-4, step=0)
        return float(result.sums[0]) / batch.num_supervised_tokens

    return run


def their_step(
    config: ModelConfig, bins: list[Rows], device: torch.device, dtype: torch.dtype, compiled: bool
) -> Callable[[], float]:
    """One optimizer step of transformers' model: a padded microbatch for each of our bins."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    from hrmtext.artifacts.hf_folder import to_hf_config, to_split

    values = {**to_hf_config(config), "L_bp_cycles": list(L_BP_CYCLES)}
    values.pop("model_type", None), values.pop("architectures", None)
    model = HrmTextForCausalLM._from_config(HrmTextConfig(**values), attn_implementation="sdpa")
    model.load_state_dict(to_split(build_model(config, seed=0).state_dict()))
    model.to(device).train()
    if compiled:
        model.forward = torch.compile(model.forward)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.1, fused=True)
    batches = [padded(rows, device) for rows in bins]
    supervised = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch in batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        return float(torch.stack(losses).sum())

    return run


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the device's allocator since its reset, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured_peak(step: Callable[[], float], device: torch.device) -> int:
    """Peak memory of one step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return peak_bytes(device)


def profile(step: Callable[[], float], device: torch.device) -> dict[str, Any]:
    """Where the device's time of one step goes: by kind, idle time, and the longest kernels."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step()
    synchronize(device)
    with torch_profile(activities=activities) as record:
        step()
        synchronize(device)
    spent: dict[str, float] = {}
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in record.events() if event.device_type == wanted]
    for event in record.key_averages():
        if event.device_type == wanted:
            seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[event.key] = spent.get(event.key, 0.0) + seconds / 1e6
    wall = (
        max(event.time_range.end for event in events)
        - min(event.time_range.start for event in events)
    ) / 1e6
    kinds = dict.fromkeys((*KERNEL_KINDS, "elementwise and copies"), 0.0)
    for name, seconds in spent.items():
        kinds[kind_of(name)] += seconds
    busy = sum(spent.values())
    return {
        "wall_s": round(wall, 4),
        "share": {kind: round(seconds / wall, 3) for kind, seconds in kinds.items()}
        | {"idle": round(max(0.0, 1 - busy / wall), 3)},
        "longest": [
            {"kernel": name[:100], "seconds": round(seconds, 5)}
            for name, seconds in sorted(spent.items(), key=lambda item: -item[1])[:12]
        ],
    }


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel's name tells; attention before its own matrix products."""
    lower = kernel.lower()
    for kind in ("attention", "optimizer", "matmul"):
        if any(part in lower for part in KERNEL_KINDS[kind]):
            return kind
    return "elementwise and copies"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of a run."""
    device = pick_device(arguments.device)
    given = None if arguments.dtype == "auto" else arguments.dtype
    dtype = DTYPES[given] if given else pick_training_dtype(None, device)
    config = preset(arguments.preset)
    bins = [
        mixture_rows(arguments.bin_tokens, config, seed=number) for number in range(arguments.bins)
    ]
    num_tokens = sum(len(p) + len(r) - 1 for rows in bins for p, r in rows)
    supervised = sum(len(r) for rows in bins for _, r in rows)
    choices = {
        "attention": arguments.attention, "compile": arguments.compile == "yes",
        "loss": arguments.loss, "optimizer_kernel": arguments.optimizer_kernel,
        "activation_checkpointing": arguments.activation_checkpointing,
    }  # fmt: skip
    ours = our_step(config, bins, arguments.bin_tokens, device, dtype, choices)
    losses = {"ours": ours()}
    peaks = {"ours": measured_peak(ours, device)}
    seconds = interleave({"ours": ours}, rounds=arguments.rounds, device=device)
    found = profile(ours, device)
    problem = None
    if arguments.transformers == "yes":
        try:
            theirs = their_step(config, bins, device, dtype, choices["compile"])
            losses["transformers"] = theirs()
            both = {"ours": ours, "transformers": theirs}
            seconds = interleave(both, rounds=arguments.rounds, device=device)
            if device.type == "cuda":
                del ours, both
                peaks["transformers"] = measured_peak(theirs, device)
        except torch.OutOfMemoryError as error:
            problem = f"transformers' step does not fit: {str(error).splitlines()[0]}"
    ceiling = matmul_flops(device, dtype, size=8192 if device.type == "cuda" else 1024)
    flops = num_tokens * training_flops(
        config,
        Depth.from_L_bp_cycles(config, L_BP_CYCLES),
        context_tokens=sum(
            float(PackedBatch.from_rows(rows).layout.visible_end.float().sum()) for rows in bins
        )
        / num_tokens,
        head_share=supervised / num_tokens,
    )
    rate = flops / statistics.median(seconds["ours"])
    return {
        "preset": arguments.preset,
        "number_format": str(dtype).removeprefix("torch."),
        "choices": choices,
        "bins": arguments.bins,
        "bin_tokens": arguments.bin_tokens,
        "rows": sum(map(len, bins)),
        "input_tokens": num_tokens,
        "supervised_tokens": supervised,
        "L_bp_cycles": list(L_BP_CYCLES),
        "first_loss": {name: round(value, 5) for name, value in losses.items()},
        "tokens_per_s": {
            side: summary([num_tokens / value for value in values])
            for side, values in seconds.items()
        },
        "times_faster": (
            summary(ratios(seconds, "transformers", "ours"), digits=2)
            if "transformers" in seconds
            else problem
        ),
        "peak_memory_mib": {side: round(value / 2**20) for side, value in peaks.items()},
        "roofline": {
            "matmul_flops_per_s": round(ceiling),
            "model_flops_per_s": round(rate),
            "share": round(rate / ceiling, 3),
        },
        "profile": found,
    }


def main(argv: list[str] | None = None, results: Path | None = None) -> None:
    """Measure and write results/train_gpu-<device>.json, or the same file under `results`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--preset", default="XL")
    parser.add_argument("--bin-tokens", type=int, default=6_144)
    parser.add_argument("--bins", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--loss", default="auto")
    parser.add_argument("--optimizer-kernel", default="auto")
    parser.add_argument("--activation-checkpointing", default="none")
    parser.add_argument("--compile", default=None, choices=("yes", "no"))
    parser.add_argument("--transformers", default="yes", choices=("yes", "no"))
    arguments = parser.parse_args(argv)
    device = pick_device(arguments.device)
    if arguments.compile is None:
        arguments.compile = "yes" if device.type == "cuda" else "no"
    write_result("train_gpu", device, measure(arguments), folder=results)


if __name__ == "__main__":
    main()
