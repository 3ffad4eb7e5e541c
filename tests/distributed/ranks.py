"""Cases that run inside a process group; `launch` starts one."""

import functools
import json
import os
import warnings

import processes

STEPS = 4
ROWS = 16
GRIDS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "hsdp 2x1": {"parallel": "hsdp", "shard_size": 1},
    "hsdp 1x2": {"parallel": "hsdp", "shard_size": 2},
}


# Every form, accumulation and composition is minutes of work: by default one of each kind is tried.
EVERYTHING = os.environ.get("HRM_TEXT_STRATEGIES") == "all"
FEW = [
    ("ddp", {}, 2),
    ("fsdp", {}, 1),
    ("fsdp", {}, 4),
    ("fsdp", {"activation_checkpointing": "all"}, 2),
    ("hsdp 2x1", {}, 2),
]
ALL = [
    *((name, {}, count) for name in GRIDS for count in (1, 2, 4)),
    *((name, {"activation_checkpointing": which}, 2) for name in ("ddp", "fsdp")
      for which in ("L", "all")),
]  # fmt: skip
CURVES = {
    ", ".join([name, *(f"recomputing {which}" for which in changes.values()), f"{count} bins"]): (
        {**GRIDS[name], **changes},
        count,
    )
    for name, changes, count in (ALL if EVERYTHING else FEW)
}
"""Name -> changes of the config, bins of a step on each of two ranks."""
RUNS = {"ddp": False, "fsdp": False, "hsdp 2x1": True, "hsdp 1x2": True}
"""Grids of whole runs -> whether checkpoints are written in the background."""
if not EVERYTHING:
    del RUNS["hsdp 1x2"]


def launch(task, folder, num_ranks):
    """Run a task on `num_ranks` processes; their error output is in the failure's message."""
    log = folder / f"{task}-log"
    statuses = processes.ended(processes.start_ranks(num_ranks, run_task, task, folder, log=log))
    assert statuses == [0] * num_ranks, processes.said(log)


def source(bins_per_step=2):
    from memory_source import MemorySource, random_rows

    return MemorySource(
        random_rows(ROWS), rows_per_step=8, rows_per_bin=8 // bins_per_step,
        heldout=random_rows(7, seed=5),
    )  # fmt: skip


def curve(dtype, master_dtype, bins_per_step, compiled=False, **changes):
    """Loss and gradient norm of the first steps, K = 2 to 5, and how often each tensor moved."""
    import torch
    from memory_source import small_config

    from hrmtext.model.depth import Depth
    from hrmtext.runtime import dist
    from hrmtext.runtime.compile import compile_blocks
    from hrmtext.train.build import build_compute
    from hrmtext.train.optim import AdamAtan2
    from hrmtext.train.step import TrainStep

    config = small_config(attention="sdpa", **changes)
    device = torch.device("cpu")
    compute = build_compute(config, dtype, device, master_dtype=master_dtype)
    optimizer = AdamAtan2(compute.shards.parameters.values(), lr=3e-3, ema_decay=0.9)
    step = TrainStep(compute, optimizer, config, device)
    if compiled:
        compile_blocks(compute.module, True, device=device, fixed_shapes=False)
    batches = iter(source(bins_per_step).loader(config, dist.rank(), dist.world_size()))
    losses, norms = [], []
    for number in range(STEPS):
        batch = next(batches)
        depth = Depth.from_bp_steps(config.model.resolve(), 2 + number)
        result = step.run(batch, depth=depth, lr=3e-3, step=number)
        sums = dist.sum_over_ranks(result.sums)
        losses.append(float(sums[0]) / batch.num_supervised_tokens)
        norms.append(result.gradient_norm)
        assert int(sums[3]) == 8, "rows, of which padding is none"
    counts = {
        name: optimizer.state[parameter]["step"]
        for name, parameter in compute.shards.parameters.items()
    }
    return {"losses": losses, "norms": norms, "moved": counts}


def initial(parallel):
    """Whether this rank's chunks are those of the weights that one device draws."""
    import torch
    from memory_source import small_config

    from hrmtext.model import build_model
    from hrmtext.train.build import build_compute

    config = small_config(**parallel)
    compute = build_compute(config, torch.float32, torch.device("cpu"))
    whole = build_model(config.model.resolve(), seed=config.seed).state_dict()
    held = compute.shards.parameters
    same = all(torch.equal(part, compute.shards.part(whole[name])) for name, part in held.items())
    buffers = compute.shards.buffers
    same = same and all(torch.equal(buffer, whole[name]) for name, buffer in buffers.items())
    return {"same": same, "held": sum(p.numel() for p in held.values())}


def train_and_record(folder, **changes):
    """A run; returns the rows of every step that this rank saw, by (epoch, index)."""
    from memory_source import small_config

    from hrmtext.train import step, train_on

    seen = {}
    original = step.TrainStep.run

    def run(self, batch, **arguments):
        ids = [row for packed in batch.bins for row in packed.row_ids]
        seen[f"{batch.epoch} {batch.index}"] = sorted(ids)
        return original(self, batch, **arguments)

    step.TrainStep.run = run
    try:
        config = small_config(epochs=4, checkpoint_every=3, **changes)
        train_on(config, source(4), run_folder=folder, progress="none")
    finally:
        step.TrainStep.run = original
    return seen


def two_ranks(folder):
    import torch

    found = {"curves": {}, "initial": {}, "rows": {}}
    wide = (torch.float64, torch.float64)
    for name, grid in GRIDS.items():
        found["initial"][name] = initial(grid)
    for name, (changes, per_rank) in CURVES.items():
        found["curves"][name] = curve(*wide, 2 * per_rank, **changes)
    for name in ("ddp", "fsdp"):
        narrow = (torch.float32, torch.float32)
        found["curves"][f"{name}, fp32"] = curve(*narrow, 4, **GRIDS[name])
        mixed = (torch.bfloat16, torch.float32)
        found["curves"][f"{name}, bf16"] = curve(*mixed, 4, **GRIDS[name])
    if EVERYTHING:
        # The composition of hooks and traced blocks is tested here, the code generator elsewhere.
        compile_plainly = torch.nn.Module.compile
        torch.nn.Module.compile = functools.partialmethod(compile_plainly, backend="aot_eager")
        for name in ("ddp", "fsdp"):
            found["curves"][f"{name}, compiled"] = curve(*wide, 2, compiled=True, **GRIDS[name])
        torch.nn.Module.compile = compile_plainly
    for name, background in RUNS.items():
        changes = {**GRIDS[name], "checkpoint_async": background, "keep_last": 9}
        found["rows"][name] = train_and_record(folder / name.replace(" ", "-"), **changes)
    return found


def three_ranks(folder):
    """Runs that two ranks began go on, with other forms of parallelism than they had."""
    rows = {
        name: train_and_record(folder / f"{name}-on-3", parallel=other)
        for name, other in (("fsdp", "ddp"), ("ddp", "fsdp"))
    }
    return {"rows": rows, "initial": {"fsdp": initial({"parallel": "fsdp"})}}


def run_task(task, folder):
    """One rank; what the task found is left in the folder as JSON."""
    warnings.simplefilter("error")
    # The tracer looks for .grad of every tensor that it meets; torch warns of its own look.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
    import torch
    import torch.distributed as torch_dist

    from hrmtext.train.parallel import process_group

    with process_group(torch.device("cpu")):
        found = {"two": two_ranks, "three": three_ranks}[task](folder)
        file = folder / f"{task}-{torch_dist.get_rank()}.json"
        file.write_text(json.dumps(found), encoding="utf-8")
