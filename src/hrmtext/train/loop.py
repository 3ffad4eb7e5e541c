"""The training loop: schedule, steps, log, validation, checkpoints, interruption, resume."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from hrmtext.artifacts.layout import RunFolder, describe_versions
from hrmtext.config.base import build, dump_yaml, to_mapping
from hrmtext.config.train import TrainConfig
from hrmtext.data.heldout import ValidationBatch
from hrmtext.data.loader import GlobalBatch
from hrmtext.errors import CheckpointError, ConfigError, TrainingInterrupted
from hrmtext.model.depth import Depth
from hrmtext.model.flops import training_flops
from hrmtext.runtime import dist
from hrmtext.runtime.compile import compile_blocks
from hrmtext.runtime.device import keep_few_kernels, pick_device, pick_training_dtype
from hrmtext.runtime.log import logger
from hrmtext.runtime.memory import MemoryRelease
from hrmtext.train.build import build_compute
from hrmtext.train.checkpoint import CheckpointWriter, RunIdentity, load_checkpoint
from hrmtext.train.elastic import num_losses
from hrmtext.train.forgetting import ForgettingCheck, describe
from hrmtext.train.lora import parameter_groups
from hrmtext.train.metrics import Interval, MetricsLog, Stopwatch, device_use, read_metrics
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.parallel import any_rank, process_group, wait_for_all
from hrmtext.train.progress import TrainingProgress
from hrmtext.train.report import write_report
from hrmtext.train.schedule import depth_at, learning_rate
from hrmtext.train.signals import StopRequest
from hrmtext.train.source import DataSource, FolderSource, check_data
from hrmtext.train.start import start_from, warn_of_slow_average
from hrmtext.train.state import TrainResult, TrainState
from hrmtext.train.step import StepResult, TrainStep
from hrmtext.train.validate import Validation, validate_both
from hrmtext.train.watchdog import GROUP_MARGIN, Watchdog, explain_lost_ranks

Resume = Literal["auto", "never", "must"]


def train(
    config: TrainConfig,
    *,
    data_folder: str | Path,
    run_folder: str | Path,
    resume: Resume = "auto",
    device: str | None = None,
    dtype: str | None = None,
    progress: str = "auto",
) -> TrainResult:
    """Train on a prepared data folder; see `train_on`.

    Args:
        data_folder: what `hrm-text data prepare` made.
        dtype: auto, fp32 or bf16 instead of the config's `precision`.

    Raises:
        DataError: the data folder is not whole; and all that `train_on` raises.
    """
    if dtype is not None:
        config = build(TrainConfig, {**to_mapping(config), "precision": dtype}, where="dtype")
    return train_on(
        config,
        FolderSource(data_folder),
        run_folder=run_folder,
        resume=resume,
        device=device,
        progress=progress,
    )


def train_on(
    config: TrainConfig,
    source: DataSource,
    *,
    run_folder: str | Path,
    resume: Resume = "auto",
    device: str | None = None,
    progress: str = "auto",
) -> TrainResult:
    """Train on any data source; `train` is the same on a prepared data folder.

    Args:
        run_folder: made if absent; what it holds is never overwritten.
        resume: `auto` continues the run that is there or starts one, `never` only starts, `must`
            only continues.
        device: cpu, cuda, cuda:N; None: CUDA where there is one.
        progress: auto, bar, lines or none.

    Raises:
        ConfigError, CheckpointError, StorageError, NonFiniteError: as their messages say.
        RankError: another rank was lost.
        TrainingInterrupted: SIGINT or SIGTERM came; a checkpoint of the last step is written.
    """
    timeout_s = config.rank_timeout_s * GROUP_MARGIN
    with (
        process_group(pick_device(device), timeout_s=timeout_s) as own_device,
        StopRequest() as stop,
        Watchdog(config.rank_timeout_s) as watchdog,
        explain_lost_ranks(watchdog),
    ):
        session = Session(config, source, RunFolder(run_folder), own_device, stop, watchdog)
        session.begin(resume)
        return session.run(progress)


class Session:
    """One process's part in a run, from start or resume to the end or an interruption."""

    def __init__(
        self,
        config: TrainConfig,
        source: DataSource,
        folder: RunFolder,
        device: torch.device,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.source, self.folder, self.device = config, source, folder, device
        self.stop, self.watchdog = stop, watchdog
        self.is_writer = dist.rank() == 0
        self.model_config = config.model.resolve()
        check_data(config, source)
        dtype = pick_training_dtype(config.precision, device)
        if device.type == "cpu":
            keep_few_kernels()
        self.total_steps = config.max_steps or source.num_steps(config)
        self.identity = RunIdentity(
            config=config,
            data_fingerprint=source.fingerprint,
            precision="bf16" if dtype == torch.bfloat16 else "fp32",
            total_steps=self.total_steps,
        )
        self.compute = build_compute(config, dtype, device)
        shards = self.compute.shards
        optimizer = AdamAtan2(
            shards.parameters.values()
            if config.lora is None
            else parameter_groups(self.compute.master, config.lora),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            ema_decay=config.ema_decay,
            kernel=config.optimizer_kernel,
        )
        self.state = TrainState(model=self.compute.master, optimizer=optimizer, shards=shards)
        self.step = TrainStep(self.compute, optimizer, config, device)
        self.loader = source.loader(config, dist.rank(), dist.world_size())
        wanted = config.checkpoint_async
        self.checkpoints = CheckpointWriter(
            folder, shards, self.identity, source.tokenizer_folder,
            in_background=device.type == "cuda" if wanted == "auto" else wanted,
        )  # fmt: skip
        self.forgetting = ForgettingCheck.of(config, source.tokenizer_folder)
        self.interval = Interval(device)
        self.watch = Stopwatch()
        self.memory = MemoryRelease(device)
        self.last_validation: Validation | None = None

    def begin(self, resume: Resume) -> None:
        """Start the run folder, or bring the state to its latest checkpoint."""
        if resume not in ("auto", "never", "must"):
            raise ConfigError(f"resume is {resume!r}, expected auto, never or must")
        checkpoint = self._checkpoint_to_resume(resume)
        # A checkpoint of adapters does not hold the base, which a resumed run takes up again.
        needs_start = checkpoint is None or self.config.lora is not None
        if needs_start and self.config.init_from is not None:
            taken = start_from(self.config, self.state, self.source.tokenizer_folder)
            self.compute.refresh(frozen=True)
            logger.info("starting from %s", taken)
        wait_for_all()  # the writer starts the folder only after every rank has looked at it
        if self.is_writer:
            if self.folder.exists:
                for leftover in self.folder.remove_leftovers():
                    logger.info("removed %s, left by an interrupted run", leftover)
            else:
                facts = describe_versions(self.device, self.source.fingerprint)
                self.folder.start(dump_yaml(self.config), facts)
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.state, self.identity)
            self.compute.refresh()
            self.loader.restore(self.state.cursor)
            self.interval.restore(self.state.interval)
            self.step.watch.restore(self.state.stability)
            logger.info("resuming at step %d from %s", self.state.step, checkpoint)
        warn_of_slow_average(self.config, self.total_steps)
        compile_blocks(
            self.compute.module,
            self.config.compile,
            device=self.device,
            fixed_shapes=self.config.pad_bins,
        )

    def _checkpoint_to_resume(self, resume: Resume) -> Path | None:
        if resume == "never":
            if self.folder.exists:
                raise CheckpointError(
                    f"{self.folder.path} holds a run already; resume it (resume=auto), or name "
                    "another folder"
                )
            return None
        if resume == "must" or self.folder.checkpoints():
            return self.folder.latest()
        return None

    def run(self, progress: str) -> TrainResult:
        """Step until the end, the time budget or a signal."""
        self.began = time.perf_counter() - self.state.elapsed_s
        log = None
        shown = TrainingProgress(progress if self.is_writer else "none", self.total_steps)
        if self.is_writer:
            log = MetricsLog.of(self.folder, self.config, resumed_step=self.state.step)
        try:
            stopped_by = self._steps(log, shown)
            self.checkpoints.finish()
        except TrainingInterrupted:
            if self.is_writer:
                write_report(self.folder)
            raise
        finally:
            self.checkpoints.writer.close()
            shown.close()
            if log is not None:
                log.close()
        checkpoint = self.folder.checkpoint_path(self.state.step)
        if self.is_writer:
            write_report(self.folder)
        return TrainResult(
            run_folder=self.folder.path,
            checkpoint=checkpoint,
            step=self.state.step,
            total_steps=self.total_steps,
            tokens=self.state.tokens,
            elapsed_s=self.state.elapsed_s,
            stopped_by=stopped_by,
            validation=self.last_validation,
        )

    def _steps(
        self, log: MetricsLog | None, shown: TrainingProgress
    ) -> Literal["end", "max_minutes"]:
        batches = iter(self.loader)
        stopped_by: Literal["end", "max_minutes"] = "end"
        saved = self.state.step if self.state.step else -1
        self.saved_at = time.perf_counter()
        self._check_forgetting(log, shown, is_start=True)
        self.watch.take()
        while self.state.step < self.total_steps:
            if self._out_of_time():
                stopped_by = "max_minutes"
                break
            self.checkpoints.writer.check()
            self.watchdog.beat("step", self.state.step + 1)
            self._one_step(next(batches), log, shown)
            step, config = self.state.step, self.config
            self.memory.tick()
            is_last = step == self.total_steps
            self.watch.pause()
            if is_last or (config.validate_every and step % config.validate_every == 0):
                self._validate(log, shown)
            interrupted = any_rank(self.stop.signal_name is not None, self.device)
            overdue = self._is_overdue()
            if is_last or interrupted or overdue or step % config.checkpoint_every == 0:
                self._save(log)
                saved = step
            if interrupted and not is_last:
                self.checkpoints.finish()
                raise TrainingInterrupted(
                    f"{self.stop.signal_name or 'a signal on another rank'}: stopped after step "
                    f"{step} of {self.total_steps}; the checkpoint "
                    f"{self.folder.checkpoint_path(step)} is complete. Run the same command again "
                    "to go on from there"
                )
            self.watch.go_on()
        if saved != self.state.step:  # out of time between two checkpoints
            self._validate(log, shown)
            self._save(log)
        return stopped_by

    def _one_step(
        self, batch: GlobalBatch, log: MetricsLog | None, shown: TrainingProgress
    ) -> None:
        state = self.state
        lr = learning_rate(state.step, self.config, self.total_steps)
        depth = depth_at(state.step, self.config, self.model_config, self.total_steps)
        result = self.step.run(batch, depth=depth, lr=lr, step=state.step)
        state.step += 1
        state.tokens += batch.num_tokens
        state.supervised_tokens += batch.num_supervised_tokens
        self._count(batch, depth, result)
        for found in result.records:
            if log is not None:
                log.write(found)
            shown.note(found)
        if state.step % self.config.log_every == 0 or state.step == self.total_steps:
            record = self._record(batch, depth, lr)
            if log is not None:
                log.write(record)
            shown.update(record, self._time_left(record))

    def _count(self, batch: GlobalBatch, depth: Depth, result: StepResult) -> None:
        seen = sum(packed.layout.num_seen for packed in batch.bins)
        own_tokens = sum(sum(packed.layout.lengths) for packed in batch.bins)
        flops = batch.num_tokens * training_flops(
            self.model_config,
            depth,
            context_tokens=seen / max(1, own_tokens),
            head_share=batch.num_supervised_tokens / max(1, batch.num_tokens),
            losses=num_losses(self.config, depth),
            frozen=self.config.lora is not None,
        )
        self.interval.add(
            result.sums,
            steps=1,
            tokens=batch.num_tokens,
            supervised_tokens=batch.num_supervised_tokens,
            flops=flops,
            gradient_norm=result.gradient_norm,
        )

    def _record(self, batch: GlobalBatch, depth: Depth, lr: float) -> dict[str, Any]:
        means = self.interval.take()
        seconds = max(1e-9, self.watch.take())
        flops_per_s = means.pop("interval_flops") / seconds
        timing: dict[str, float] = {
            "tokens_per_s": means.pop("interval_tokens") / seconds,
            "flops_per_s": flops_per_s,
            "elapsed_s": time.perf_counter() - self.began,
        }
        timing |= device_use(self.device, flops_per_s / dist.world_size())
        return {
            "kind": "train",
            "step": self.state.step,
            "epoch": batch.epoch,
            **means,
            "lr": lr,
            "bp_steps": depth.num_gradient_calls,
            "H_cycles": depth.H_cycles,
            "tokens": self.state.tokens,
            "supervised_tokens": self.state.supervised_tokens,
            "timing": timing,
        }

    def _time_left(self, record: dict[str, Any]) -> float | None:
        tokens_per_step = self.state.tokens / self.state.step
        steps = self.total_steps - self.state.step
        left = steps * tokens_per_step / max(1e-9, record["timing"]["tokens_per_s"])
        if self.config.max_minutes is not None:
            left = min(left, self.config.max_minutes * 60 - record["timing"]["elapsed_s"])
        return left

    def _out_of_time(self) -> bool:
        if self.config.max_minutes is None:
            return False
        late = time.perf_counter() - self.began > self.config.max_minutes * 60
        return any_rank(late, self.device)

    def _is_overdue(self) -> bool:
        """Whether the last checkpoint is older than `checkpoint_minutes`, by the writer's clock."""
        if self.config.checkpoint_minutes is None:
            return False
        late = time.perf_counter() - self.saved_at > self.config.checkpoint_minutes * 60
        return any_rank(late and self.is_writer, self.device)

    def _validate(self, log: MetricsLog | None, shown: TrainingProgress) -> None:
        self._check_forgetting(log, shown)
        batches = self.source.validation(self.config)
        if not batches:
            return
        self.watchdog.beat("validation", self.state.step)
        results = self._score(batches)
        self.last_validation = Validation(self.state.step, results["raw"], results["ema"])
        if log is not None:
            log.write(self.last_validation.record())
        shown.say(
            f"validation at step {self.state.step}: "
            + "; ".join(
                f"{name} loss {value['loss']:.4f}, answers right {100 * value['exact_answer']:.1f}%"
                for name, value in results.items()
            )
        )

    def _score(self, batches: Sequence[ValidationBatch]) -> dict[str, dict[str, Any]]:
        averages = self.state.optimizer.averages()
        return validate_both(
            self.compute, averages, batches, self.config, self.device, self.step.blocks
        )

    def _check_forgetting(
        self, log: MetricsLog | None, shown: TrainingProgress, *, is_start: bool = False
    ) -> None:
        if self.forgetting is None:
            return
        earlier = read_metrics(self.folder.metrics_file) if is_start else None
        record = self.forgetting.run(self.state.step, self._score, earlier)
        if record is None:
            return
        if log is not None:
            log.write(record)
        shown.say(f"forgetting at step {self.state.step}, {describe(record)}")

    def _save(self, log: MetricsLog | None) -> None:
        self.watchdog.beat("checkpoint", self.state.step)
        self.state.elapsed_s = time.perf_counter() - self.began
        self.state.cursor = self.loader.state()
        self.state.interval = self.interval.state()
        self.state.stability = self.step.watch.state()
        if log is not None:
            log.sync()
        last = self.last_validation
        loss = last.ema["loss"] if last is not None and last.step == self.state.step else None
        self.checkpoints.save(self.state, loss)
        self.saved_at = time.perf_counter()
