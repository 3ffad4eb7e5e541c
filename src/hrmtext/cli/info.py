"""hrm-text info"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from hrmtext.config.model import ModelConfig


def info(
    model: Annotated[str | None, tyro.conf.Positional] = None,
    /,
) -> int:
    """Show a model's shape, parameters and cost, or, without one, this machine and the presets.

    Args:
        model: a preset (B, L, XL, ...), run folder, checkpoint or Hugging Face folder.
    """
    from rich.console import Console

    from hrmtext.config.model import PRESETS

    console = Console()
    if model is None:
        _machine(console)
        _presets(console)
        return 0
    if model in PRESETS:
        config = PRESETS[model]
    else:
        from hrmtext.api import read_config

        config = read_config(model)
        _checkpoints(console, Path(model))
    _model(console, config)
    return 0


def _machine(console: Console) -> None:
    from hrmtext import __version__
    from hrmtext.runtime.device import describe, pick_device

    console.print(f"hrm-text {__version__}")
    for name, value in describe(pick_device()).items():
        console.print(f"  {name:20} {value}")


def _checkpoints(console: Console, folder: Path) -> None:
    """The checkpoints of a run folder; nothing for other models."""
    from rich.table import Table

    from hrmtext.artifacts import RunFolder

    run = RunFolder(folder)
    there = run.checkpoints() if run.exists else []
    if not there:
        return
    losses = run.losses()
    best = run.best() if losses else None
    table = Table("checkpoint", "name", "validation loss, EMA", "GiB")
    for path in there:
        names = {there[-1]: "last", best: "best"} if best != there[-1] else {best: "last, best"}
        size = sum(file.stat().st_size for file in path.iterdir())
        loss = f"{losses[path]:.4f}" if path in losses else "not validated"
        table.add_row(path.name, names.get(path, ""), loss, f"{size / 2**30:.2f}")
    console.print(table)


def _presets(console: Console) -> None:
    from rich.table import Table

    from hrmtext.config.model import PRESETS
    from hrmtext.model.flops import count_parameters, forward_flops

    table = Table("preset", "parameters", "hidden", "layers a stack", "cycles", "GFLOP a token")
    for name, config in PRESETS.items():
        table.add_row(
            name,
            f"{count_parameters(config).stored / 1e6:,.1f} M",
            str(config.hidden_size),
            str(config.num_layers_per_stack),
            f"H {config.H_cycles} x L {config.L_cycles}",
            f"{forward_flops(config) / 1e9:.3f}",
        )
    console.print(table)


def _model(console: Console, config: ModelConfig) -> None:
    from hrmtext.config.base import dump_yaml
    from hrmtext.model.depth import Depth
    from hrmtext.model.flops import (
        count_parameters,
        forward_flops,
        kv_bytes_per_token,
        training_flops,
    )

    counts = count_parameters(config)
    console.print(dump_yaml(config), highlight=False)
    deepest = Depth.from_bp_steps(config, min(5, config.num_stack_calls))
    kv_bytes = kv_bytes_per_token(config, 2)
    rows = {
        "parameters stored": f"{counts.stored:,}",
        "parameters unfolded": f"{counts.unfolded:,} (every stack call counted anew)",
        "forward": f"{forward_flops(config) / 1e9:.3f} GFLOP a token, attention scores apart",
        "training step": f"{training_flops(config, deepest) / 1e9:.3f} GFLOP a token, "
        f"{deepest.num_gradient_calls} of {config.num_stack_calls} stack calls with gradient",
        "KV cache": f"{kv_bytes:,} bytes a token in bf16, {config.num_slots} slots; "
        f"{kv_bytes * config.max_seq_len / 2**30:.2f} GiB at {config.max_seq_len:,} tokens",
        "weights": f"{counts.stored * 2 / 2**30:.2f} GiB in bf16, "
        f"{counts.stored * 4 / 2**30:.2f} GiB in fp32",
    }
    for name, value in rows.items():
        console.print(f"{name:20} {value}", highlight=False)
