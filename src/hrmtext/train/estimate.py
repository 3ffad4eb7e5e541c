"""What a run will take, before it starts: parameters, operations, memory, time."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from hrmtext.config.base import dump_yaml, nearest
from hrmtext.config.model import ModelConfig
from hrmtext.config.train import TrainConfig
from hrmtext.errors import ConfigError
from hrmtext.model.depth import Depth
from hrmtext.model.flops import count_parameters, training_flops
from hrmtext.runtime.device import pick_training_dtype
from hrmtext.train.elastic import cycle_choices, num_losses
from hrmtext.train.lora import count_adapters
from hrmtext.train.metrics import PEAK_BF16_FLOPS, named_peak_flops, peak_flops
from hrmtext.train.probe import (
    TYPICAL_HEAD_SHARE,
    TYPICAL_ROW_TOKENS,
    measure_speed,
)
from hrmtext.train.progress import format_time
from hrmtext.train.recompute import Recomputed
from hrmtext.train.schedule import depth_with
from hrmtext.train.source import DataSource

ASSUMED_SHARE = 0.38
"""Share of a GPU's bf16 peak that the published runs reached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
    """GPUs that are not at hand: what a run on them would take."""

    count: int
    gpu: str = "H100"
    """Part of its name, as in `metrics.PEAK_BF16_FLOPS`."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"gpus is {self.count}, expected at least 1")
        if named_peak_flops(self.gpu) is None:
            known = nearest(self.gpu, [*PEAK_BF16_FLOPS])
            raise ConfigError(f"nothing is known about the GPU {self.gpu!r}{known}")

    @property
    def peak(self) -> float:
        """Dense bf16 operations a second of one."""
        peak = named_peak_flops(self.gpu)
        assert peak is not None, "checked when it was made"
        return peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device; weights, optimizer, ema and gradients are a share where sharded."""

    weights: int
    """fp32 master weights."""
    optimizer: int
    """Two fp32 moments of what is trained."""
    ema: int
    gradients: int
    """fp32 gradients."""
    compute_copy: int
    """bf16 weights and their gradients, 0 in fp32; sharded: the gathered weights and the whole
    gradient of a step, in any format."""
    activations: int
    """Saved for the backward pass of one bin at the deepest setting; an estimate."""
    logits: int
    """One chunk of logits and the fp32 gradient of the head."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(dataclasses.astuple(self))

    def parts(self) -> str:
        """The parts that are not zero, for people."""
        return ", ".join(
            f"{field.name.replace('_', ' ')} {format_bytes(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `--dry-run` shows."""

    config: TrainConfig
    model: ModelConfig
    precision: str
    stored_parameters: int
    trained_parameters: int
    """All of them, or those of the adapters."""
    unfolded_parameters: int
    total_steps: int | None
    """None: depends on the data, and none was given."""
    total_tokens: float | None
    flops_per_token: float
    """At full backward depth."""
    total_flops: float | None
    """Over the depth schedule."""
    memory: Memory
    """Every device holding the whole model."""
    sharded_memory: Memory | None
    """With weights, gradients and optimizer spread over all devices; None with one device."""
    num_devices: int
    device_name: str
    tokens_per_s: float | None
    seconds: float | None
    """Expected training time, validation and checkpoints left out."""
    basis: str
    """Where the speed comes from."""

    def text(self) -> str:
        """The estimate for people, the resolved config first."""
        lines = [dump_yaml(self.config).rstrip(), "", *self._facts()]
        return "\n".join(lines)

    def _trained(self) -> list[tuple[str, str]]:
        if self.config.lora is None:
            return []
        share = self.trained_parameters / self.stored_parameters
        count = f"{self.trained_parameters:,} in adapters ({100 * share:.2f}%)"
        return [("trained", f"{count}; the rest is frozen, without moments or average")]

    def _facts(self) -> list[str]:
        memory = self.memory
        total = "" if self.total_tokens is None else f", {self.total_tokens:,.0f} in all"
        facts = [
            ("parameters", f"{self.stored_parameters:,} stored, {self.unfolded_parameters:,} "
                           f"unfolded over {self.model.num_stack_calls} stack calls"),
            *self._trained(),
            ("precision", f"{self.precision} forward and backward, fp32 master weights"),
            ("steps", "depends on the data" if self.total_steps is None
                      else f"{self.total_steps:,} of {self.config.batch_tokens:,} tokens{total}"),
            ("FLOPs a token", f"{self.flops_per_token / 1e9:.4g} G at full backward depth"),
        ]  # fmt: skip
        if self.total_flops is not None:
            facts.append(("FLOPs in all", f"{self.total_flops:.3g}"))
        if self.num_devices > 1:
            facts.append(("devices", f"{self.num_devices} x {self.device_name}"))
        facts.append(("memory", f"about {format_bytes(memory.total)} a device: {memory.parts()}"))
        sharded = self.sharded_memory
        if sharded is not None:
            text = f"about {format_bytes(sharded.total)} a device: {sharded.parts()}"
            facts.append(("  if sharded", text))
        if self.tokens_per_s is not None:
            facts.append(("speed", f"{self.tokens_per_s:,.0f} tokens/s ({self.basis})"))
        if self.seconds is not None:
            facts.append(("time", f"about {format_time(self.seconds)}"))
        elif self.tokens_per_s is None:
            facts.append(("time", self.basis))
        return [f"{name + ':':<15}{value}" for name, value in facts]


def estimate(
    config: TrainConfig,
    *,
    source: DataSource | None = None,
    device: torch.device,
    num_devices: int = 1,
    fleet: Fleet | None = None,
    epoch_tokens: float | None = None,
    measure: bool = False,
) -> Estimate:
    """Count what can be counted, and measure or assume the speed.

    Args:
        source: gives the number of steps; without it `max_steps` does, or `epoch_tokens`.
        device: where the run will be.
        num_devices: data-parallel devices.
        fleet: GPUs where the run will be instead, by their data sheet.
        epoch_tokens: tokens of one epoch, where there is no data yet.
        measure: run a few real steps here; otherwise a GPU's data sheet is taken, at the share
            of its peak that the published runs reached, and a CPU's time stays unknown.
    """
    if fleet is not None and measure:
        raise ConfigError(
            "a measured speed is this machine's: leave out --measure, or --gpus; on the GPUs "
            "themselves --measure alone will do"
        )
    model = config.model.resolve()
    if fleet is None:
        dtype, name = pick_training_dtype(config.precision, device), device.type
        peak = peak_flops(device)
    else:
        dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        num_devices, name, peak = fleet.count, fleet.gpu, fleet.peak
    counts = count_parameters(model)
    total_steps = config.max_steps
    if total_steps is None and source is not None:
        total_steps = source.num_steps(config)
    if total_steps is None and epoch_tokens is not None:
        total_steps = max(1, round(config.epochs * epoch_tokens / config.batch_tokens))
    shape = {"context_tokens": TYPICAL_ROW_TOKENS / 2, "head_share": TYPICAL_HEAD_SHARE}
    deepest = depth_with(total_steps or 1, config, model, total_steps or 1, model.H_cycles)
    flops_per_token = step_flops(config, model, deepest, shape)
    total_tokens = total_flops = None
    if total_steps is not None:
        total_tokens = float(total_steps) * config.batch_tokens
        mean = _mean_flops(config, model, total_steps, shape)
        total_flops = mean * total_tokens
    if measure:
        tokens_per_s, basis = _measured(config, model, device, num_devices, source)
    else:
        tokens_per_s, basis = _assumed(peak, num_devices, flops_per_token)
    seconds = None
    if total_flops is not None and tokens_per_s is not None:
        seconds = total_flops / (tokens_per_s * flops_per_token)
        if config.max_minutes is not None:
            seconds = min(seconds, config.max_minutes * 60)
    return Estimate(
        config=config,
        model=model,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        stored_parameters=counts.stored,
        trained_parameters=trained_parameters(config, model),
        unfolded_parameters=counts.unfolded,
        total_steps=total_steps,
        total_tokens=total_tokens,
        flops_per_token=flops_per_token,
        total_flops=total_flops,
        memory=estimate_memory(config, model, dtype, deepest, num_devices),
        sharded_memory=estimate_memory(
            config, model, dtype, deepest, num_devices, shards=num_devices
        )
        if num_devices > 1 and config.lora is None
        else None,
        num_devices=num_devices,
        device_name=name,
        tokens_per_s=tokens_per_s,
        seconds=seconds,
        basis=basis,
    )


def estimate_memory(
    config: TrainConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    depth: Depth,
    num_devices: int = 1,
    *,
    shards: int = 1,
) -> Memory:
    """Bytes on one device; activations by `activation_bytes`.

    `shards`: devices that share one copy of weights, gradients and optimizer state. Weights are
    gathered for the length of a step, as a recurrence calls every block many times.
    """
    trained = trained_parameters(config, model)
    stored = count_parameters(model).stored + (0 if config.lora is None else trained)
    is_copy = dtype != torch.float32
    bins = max(1, config.batch_tokens // config.bin_size)
    tokens = config.bin_size if bins >= num_devices else config.batch_tokens // num_devices
    chunk = min(config.loss_chunk_bytes, 4 * model.vocab_size * tokens)
    ends = model.vocab_size * model.hidden_size  # numbers of the embedding, and of the head
    copy = rounded = 0
    if shards > 1:
        copy = (2 if is_copy else 4) * stored + 4 * stored
    elif is_copy:
        rounded = 2 * ends  # the head, while the loss is computed
        copy = 2 * (stored + trained - 2 * ends * (1 if config.lora is not None else 2))
    head = 0  # its gradient, where it has one
    if config.lora is None:
        head = 4 * ends * num_losses(config, depth)
    return Memory(
        weights=-(-4 * stored // shards),
        optimizer=-(-8 * trained // shards),
        ema=-(-4 * trained // shards),
        gradients=-(-4 * trained // shards),
        compute_copy=copy,
        activations=int(
            activation_bytes(model, depth, dtype, config.activation_checkpointing) * tokens
        ),
        logits=int(chunk * (2.5 if is_copy else 2)) + head + rounded,
    )


def trained_parameters(config: TrainConfig, model: ModelConfig) -> int:
    """Weights that have gradient, moments and an average."""
    if config.lora is None:
        return count_parameters(model).stored
    return count_adapters(model, config.lora)


def activation_bytes(
    model: ModelConfig, depth: Depth, dtype: torch.dtype, recomputed: Recomputed = "none"
) -> float:
    """Bytes a token saved for the backward pass by eager blocks, without attention's mask.

    A block keeps, with width D, attention width A and SwiGLU width M: the fp32 input (D) and the
    output (D) of two RMSNorms; queries, keys, values and output of the attention, its output in
    stream order, the gate's sigmoid and the gated product (7 A); gate, up, silu and product (4 M).
    A block that is recomputed keeps its input, and one of them at a time the rest.
    """
    width, attention, mlp = model.hidden_size, model.attention_size, model.mlp_size
    size = 2 if dtype == torch.bfloat16 else 4
    norm = (4 + size) * width
    block = 2 * norm + size * (7 * attention + 4 * mlp)
    layers = model.num_layers_per_stack
    calls_H = sum(depth.carries_gradient[depth.L_cycles :: depth.L_cycles + 1])
    calls_L = depth.num_gradient_calls - calls_H
    by_L_alone = 0 if model.shared_stack else calls_H
    kept = {"none": calls_H + calls_L, "L": by_L_alone, "all": 0}[recomputed]
    again = depth.num_gradient_calls - kept
    return (
        depth.num_gradient_calls * norm
        + layers * (kept * block + again * size * width)
        + (block if again else 0)
    )


def step_flops(
    config: TrainConfig, model: ModelConfig, depth: Depth, shape: dict[str, float]
) -> float:
    """`training_flops` of what the config trains, with the losses that it asks for."""
    losses = num_losses(config, depth)
    return training_flops(model, depth, losses=losses, frozen=config.lora is not None, **shape)


def _mean_flops(
    config: TrainConfig, model: ModelConfig, total_steps: int, shape: dict[str, float]
) -> float:
    """Operations a token, averaged over the depth schedule and the cycles that may be drawn."""
    sampled = np.unique(np.linspace(0, total_steps - 1, 1000).astype(int)).tolist()
    mean = 0.0
    for H_cycles, probability in cycle_choices(config, model):
        depths = [depth_with(s, config, model, total_steps, H_cycles) for s in sampled]
        flops = [step_flops(config, model, depth, shape) for depth in depths]
        mean += probability * float(np.mean(flops))
    return mean


def _measured(
    config: TrainConfig,
    model: ModelConfig,
    device: torch.device,
    num_devices: int,
    source: DataSource | None,
) -> tuple[float, str]:
    speed = measure_speed(config, model, device, source)
    note = "measured here over a few steps" + ("" if source is None else " of this data")
    if num_devices > 1:
        note += f", times {num_devices} devices"
    return speed * num_devices, note


def _assumed(
    peak: float | None, num_devices: int, flops_per_token: float
) -> tuple[float | None, str]:
    if peak is None:
        return None, "unknown until measured (--measure runs a few steps)"
    speed = ASSUMED_SHARE * peak * num_devices / flops_per_token
    return speed, f"assumed: {100 * ASSUMED_SHARE:.0f}% of the device's bf16 peak, not measured"


def format_bytes(size: float) -> str:
    """`512 B`, `3.2 MiB`, `28.1 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
