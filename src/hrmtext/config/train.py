"""Training configuration; the defaults are the recipe of the HRM-Text paper at size XL."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import pydantic_core

from hrmtext.config.base import build, config_class, nearest, to_mapping
from hrmtext.config.finetune import ForgettingConfig, LoraConfig
from hrmtext.config.model import ARCHITECTURES, PRESETS, ModelConfig
from hrmtext.config.stability import StabilityLimits
from hrmtext.errors import ConfigError

AttentionName = Literal[
    "auto", "reference", "sdpa", "flex", "flash", "flash_torch", "flash_attn", "flash_reference"
]
"""Names of attention backends; a test holds them equal to those that there are."""

HARMLESS_KEYS = frozenset({
    "max_minutes", "attention", "compile", "block_kernel", "loss", "loss_chunk_bytes",
    "optimizer_kernel", "activation_checkpointing",
    "checkpoint_every", "checkpoint_minutes", "keep_last", "keep_every", "keep_best",
    "validate_every", "validation_rows", "forgetting", "log_every", "tensorboard", "trackers",
    "rank_timeout_s", "stability", "stability_limits", "telemetry_every",
    "parallel", "shard_size", "checkpoint_async",
})  # fmt: skip
"""Keys that may change between a checkpoint and its resumption: none alters what is computed, but
for the stability guard, which a run in trouble must be able to turn on or adjust."""


@config_class
class ModelChoice(ModelConfig):
    """A model by preset name, by fields, or by a preset with some fields replaced."""

    preset: str | None = None
    """Name in `config.model.PRESETS` that fills in every field not given beside it."""

    architecture: str | None = None
    """Name in `config.model.ARCHITECTURES` that sets the recurrence where it is not given."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_from_names(cls, values: Any) -> Any:
        if isinstance(values, str):
            raise ConfigError(
                f"model is {values!r}, expected a section; perhaps model.preset={values}"
            )
        if not isinstance(values, Mapping | pydantic_core.ArgsKwargs):
            return values  # pydantic says what it expected
        given = values if isinstance(values, Mapping) else values.kwargs or {}
        filled: dict[str, Any] = {}
        name = given.get("preset")
        if name is not None:
            if name not in PRESETS:
                raise ConfigError(f"model.preset: unknown {name!r}{nearest(name, [*PRESETS])}")
            filled |= to_mapping(PRESETS[name])
        name = given.get("architecture")
        if name is not None:
            known = [*ARCHITECTURES]
            if name not in ARCHITECTURES:
                raise ConfigError(f"model.architecture: unknown {name!r}{nearest(name, known)}")
            filled |= ARCHITECTURES[name]
        return {**filled, **given} if filled else values

    def resolve(self) -> ModelConfig:
        """The plain model config, with the names of preset and architecture gone."""
        values = to_mapping(self)
        del values["preset"], values["architecture"]
        return build(ModelConfig, values, where="model")


@config_class
class ElasticConfig:
    """Depth-elastic training, so that the model can answer at fewer H cycles than it has."""

    H_cycles: tuple[int, ...] = ()
    """Cycles that a step may run, one of them drawn a step, the model's own among them:
    `[1, 2]`. Empty: every step runs the model's."""
    probabilities: tuple[float, ...] | None = None
    """Share of the steps of each entry of H_cycles; null: equal shares."""
    early_loss_weight: float = 0.0
    """Weight of the loss of the state after every earlier cycle, added to the last one's; 0: none.
    """

    def __post_init__(self) -> None:
        cycles, given = self.H_cycles, self.probabilities
        fits = all(c >= 1 for c in cycles) and len(set(cycles)) == len(cycles)
        _check("elastic.H_cycles", list(cycles), fits, "different numbers of at least 1")
        if given is not None:
            fits = len(given) == len(cycles) and all(p > 0 for p in given)
            fits = fits and abs(sum(given) - 1) < 1e-6
            expected = f"{len(cycles)} shares above 0 (one an entry of H_cycles) that sum to 1"
            _check("elastic.probabilities", list(given), fits, expected)
        weight = self.early_loss_weight
        _check("elastic.early_loss_weight", weight, 0 <= weight < float("inf"), "at least 0")

    def check_model(self, H_cycles: int) -> None:
        """ConfigError where a model of `H_cycles` cannot be trained so."""
        if self.H_cycles and max(self.H_cycles) != H_cycles:
            raise ConfigError(
                f"elastic.H_cycles is {list(self.H_cycles)}, expected {H_cycles}, the model's own, "
                "as its largest entry: a model must be trained at the depth that it has"
            )
        if self.early_loss_weight and H_cycles < 2:
            raise ConfigError(
                f"elastic.early_loss_weight is {self.early_loss_weight}, but a model of one H "
                "cycle has no earlier state; set it to 0, or raise model.H_cycles"
            )


@config_class
class TrainConfig:
    """One pretraining or fine-tuning run."""

    model: ModelChoice = dataclasses.field(default_factory=lambda: ModelChoice(preset="XL"))
    """Shape of the model: `{preset: XL, vocab_size: 65536}` or every field by name."""
    init_from: str | None = None
    """Model whose weights start the run: a run, a checkpoint, a Hugging Face folder or Hub id, a
    checkpoint of the public training code; null: fresh weights."""
    init_weights: Literal["auto", "raw", "ema"] = "auto"
    """Which weights of `init_from`; auto: the EMA where there is one."""
    init_optimizer: bool = False
    """Take up the moments of `init_from` too, a checkpoint of ours or of the public training code;
    usual beside raw weights."""
    lora: LoraConfig | None = None
    """Train low-rank adapters on the stacks of `init_from` and leave its weights as they are."""
    forgetting: ForgettingConfig | None = None
    """Score held-out rows of the base's mixture before the first step and at validations."""
    seed: int = 0
    """Seed of the initial weights and of the data order."""

    epochs: int = 4
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps in all; None: as many as `epochs` take."""
    max_minutes: float | None = None
    """Stop with a checkpoint after so much training time; the schedule stays that of all steps."""
    batch_tokens: int = 196_608
    """Tokens of one optimizer step, over all ranks."""
    bin_tokens: int | None = None
    """Tokens of one forward pass; a step accumulates over its bins. None: a step is one bin."""
    pad_bins: bool = False
    """Pad every bin to `bin_tokens`, so that compiled kernels meet one shape; see `compile`."""

    lr: float = 2.2e-4
    """Peak learning rate."""
    warmup_steps: int = 2_000
    """Steps of linear warmup."""
    lr_min_ratio: float = 1.0
    """End of a cosine decay as a share of `lr`; 1: constant after the warmup."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam-atan2's first and second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on every parameter that has a gradient."""
    optimizer_kernel: Literal["auto", "foreach", "compiled", "cpp"] = "auto"
    """Update and average as one pass over the weights, compiled by torch or in C++ (fp32 on a CPU),
    or a pass for each term; auto: compiled on CUDA, cpp on a CPU with a C++ compiler."""
    ema_decay: float = 0.9999
    """Decay per step of the fp32 weight average, which is what is evaluated and released."""

    bp_first: int = 2
    """Stack calls that carry gradient at the start of training."""
    bp_last: int = 5
    """Stack calls that carry gradient after the depth warmup."""
    bp_warmup_ratio: float = 0.2
    """Share of all steps over which the backward depth grows from `bp_first` to `bp_last`."""
    L_bp_cycles: tuple[int, ...] | None = None
    """A fixed backward depth instead, in transformers' terms: L calls with gradient by H cycle."""

    elastic: ElasticConfig = dataclasses.field(default_factory=ElasticConfig)
    """Random H cycles a step, and a loss on early cycles; off as it stands."""

    objective: Literal["response", "all"] = "response"
    """Tokens that bear loss: the response's, or the prompt's too, which needs a causal model
    (model.prefix_lm: false). Validation is on responses either way."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of forward and backward; master weights, sums and EMA are always fp32."""
    attention: AttentionName = "auto"
    """Attention backend by name; `model/attention/api.py` says what each is. auto: the fastest
    that runs here."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the blocks of the model; auto: on CUDA with `pad_bins`."""
    block_kernel: Literal["auto", "torch", "cpp"] = "auto"
    """What computes the blocks: torch operations, or a C++ kernel for CPUs; auto: the kernel for
    small models on a CPU with a C++ compiler, unless another key asks for torch's."""
    loss: Literal["auto", "chunked", "compiled", "linear"] = "auto"
    """How the head's loss is computed, in chunks: plain torch, compiled between the products, or
    torch's linear_cross_entropy; auto: compiled on CUDA, all at once by a C++ kernel for a small
    head beside C++ blocks, chunked elsewhere."""
    loss_chunk_bytes: int = 268_435_456
    """Logits are computed for so many rows at a time that their fp32 form stays below this."""

    activation_checkpointing: Literal["none", "L", "all"] = "none"
    """Blocks that keep only their input and run again in the backward pass: of the L stack, or of
    both. Less memory, the same gradients; each such call costs a second forward pass."""

    stability: Literal["off", "log", "guard"] = "guard"
    """Watch every step's gradients, updates and loss: `guard` damps, leaves out or slows down those
    far outside what the run is used to, `log` only says so. A healthy run is not touched."""
    stability_limits: StabilityLimits = dataclasses.field(default_factory=StabilityLimits)
    """What counts as far outside."""
    parallel: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """How several ranks share a step. ddp: each holds everything; fsdp: weights, gradients and
    optimizer state are spread over all ranks; hsdp: over `shard_size` ranks, with a copy on each
    such group. auto: none on one rank, fsdp on CUDA, ddp on the CPU and for lora,
    hsdp with `shard_size`."""
    shard_size: int | None = None
    """hsdp: ranks that share one copy of the weights; null: those of a node."""

    checkpoint_every: int = 1_000
    """Steps between checkpoints; one is also written at the end and at Ctrl-C or SIGTERM."""
    checkpoint_minutes: float | None = None
    """Write a checkpoint as well when the last one is older than this; None: by steps alone."""
    checkpoint_async: bool | Literal["auto"] = "auto"
    """Copy the state to the host's memory and write it while training goes on; auto: on CUDA."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept as well; 0: none."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest EMA validation loss as well (`RUN/best`); of those whose
    step was validated, so let `checkpoint_every` be a multiple of `validate_every`."""
    validate_every: int = 1_000
    """Steps between validations on held-out rows; 0: only at the end."""
    validation_rows: int = 2_000
    """Held-out rows of a validation, the same each time; 0: no validation."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    telemetry_every: int = 200
    """Steps between looks inside the recurrence (`train/telemetry.py`); 0: none."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """Where the same numbers go as well; needs the extra `track`."""
    rank_timeout_s: float = 1_800.0
    """With several ranks or under torchrun: a step, validation or checkpoint that takes longer
    ends its rank with a trace, and ranks wait no longer for each other. Compilation counts."""

    @pydantic.field_validator("stability", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    def __post_init__(self) -> None:
        at_least_one = (
            "epochs", "batch_tokens", "loss_chunk_bytes", "checkpoint_every", "keep_last",
            "log_every",
        )  # fmt: skip
        for name in at_least_one:
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        not_negative = (
            "warmup_steps", "keep_every", "validate_every", "validation_rows", "telemetry_every",
        )  # fmt: skip
        for name in not_negative:
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("max_steps", "max_minutes", "checkpoint_minutes", "bin_tokens", "shard_size"):
            value = getattr(self, name)
            _check(name, value, value is None or value > 0, "above 0, or null")
        _check("lr", self.lr, self.lr > 0, "above 0")
        timeout = self.rank_timeout_s
        _check("rank_timeout_s", timeout, 0 < timeout < math.inf, "above 0, in seconds")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        _check("lr_min_ratio", self.lr_min_ratio, 0 <= self.lr_min_ratio <= 1, "from 0 to 1")
        _check("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "from 0 to below 1")
        _check("betas", self.betas, all(0 <= b < 1 for b in self.betas), "from 0 to below 1")
        ratio = self.bp_warmup_ratio
        _check("bp_warmup_ratio", ratio, 0 <= ratio <= 1, "from 0 to 1")
        needs_source = self.init_optimizer or self.init_weights != "auto"
        if needs_source and self.init_from is None:
            raise ConfigError("init_weights and init_optimizer need init_from, which is not set")
        if self.lora is not None:
            if self.init_optimizer:
                raise ConfigError("init_optimizer is for all weights; adapters start without one")
            if self.parallel in ("fsdp", "hsdp") or self.shard_size is not None:
                raise ConfigError(
                    f"parallel is {self.parallel} and shard_size {self.shard_size}, but adapters "
                    "(lora) are trained with every rank holding the frozen weights whole; use "
                    "parallel=ddp or auto, without shard_size"
                )
            if self.lora.stacks == "L" and self.model.shared_stack:
                raise ConfigError("lora.stacks: L, but this model's one stack is H")
        if self.objective == "all" and self.model.prefix_lm:
            raise ConfigError(
                "objective: all needs model.prefix_lm: false: prompt tokens that see one another "
                "would be read off, not predicted"
            )
        self.elastic.check_model(self.model.H_cycles)
        self._check_depth()
        self._check_bins()

    def _check_depth(self) -> None:
        if self.L_bp_cycles is not None:
            cycles, limit = self.L_bp_cycles, self.model.L_cycles
            fits = len(cycles) <= self.model.H_cycles and all(0 <= c <= limit for c in cycles)
            expected = f"at most {self.model.H_cycles} entries (H cycles) from 0 to {limit}"
            _check("L_bp_cycles", list(cycles), fits, expected)
            return
        calls = self.model.num_stack_calls
        fewest = min(2, calls)
        fits = fewest <= self.bp_first <= calls
        _check("bp_first", self.bp_first, fits, f"from {fewest} to {calls}")
        fits = self.bp_first <= self.bp_last <= calls
        _check("bp_last", self.bp_last, fits, f"from bp_first={self.bp_first} to {calls}")

    def _check_bins(self) -> None:
        if self.bin_tokens is not None and self.batch_tokens % self.bin_tokens:
            raise ConfigError(
                f"batch_tokens is {self.batch_tokens}, expected a multiple of bin_tokens="
                f"{self.bin_tokens}: every step is made of whole bins"
            )

    @property
    def bin_size(self) -> int:
        """Tokens of one forward pass."""
        return self.batch_tokens if self.bin_tokens is None else self.bin_tokens


def run_differences(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What differs between a saved config and `config` in ways that change a run, a line each."""
    # A key that is younger than the checkpoint stands at its default there.
    complete = {**to_mapping(TrainConfig()), **saved}
    theirs, ours = _run_keys(complete), _run_keys(to_mapping(config))
    return [
        f"{key}: {theirs.get(key, 'absent')} in the checkpoint, {ours.get(key, 'absent')} now"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]


def _run_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: config[key] for key in config if key != "model" and key not in HARMLESS_KEYS}
    model = {f"model.{key}": value for key, value in config.get("model", {}).items()}
    for name in ("model.preset", "model.architecture"):  # their fields are compared instead
        model.pop(name, None)
    return flat | model


def _check(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise ConfigError(f"{name} is {value}, expected {expected}")
