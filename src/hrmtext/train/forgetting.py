"""What fine-tuning costs elsewhere: held-out rows of the base's own mixture, before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hrmtext.artifacts.hub import local_path
from hrmtext.artifacts.opening import open_stored
from hrmtext.config.base import build, to_mapping
from hrmtext.config.finetune import ForgettingConfig
from hrmtext.config.train import TrainConfig
from hrmtext.data.heldout import ValidationBatch
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import ConfigError
from hrmtext.runtime.device import pick_device, pick_dtype
from hrmtext.train.source import FolderSource
from hrmtext.train.validate import validate

KIND = "forgetting"
"""`kind` of the records in metrics.jsonl."""
QUANTITIES = ("rows", "loss", "token_accuracy", "exact_answer")


def forgetting_batches(
    config: TrainConfig, wanted: ForgettingConfig, tokenizer_folder: Path | None
) -> list[ValidationBatch]:
    """Held-out rows of the base's mixture, packed as validation rows are.

    Args:
        tokenizer_folder: that of the model; the mixture must have been made with it.

    Raises:
        DataError: no prepared data folder. ConfigError: no held-out rows, or another tokenizer.
    """
    source = FolderSource(wanted.data)
    if tokenizer_folder is not None and source.tokenizer_folder is not None:
        ours = PromptTokenizer.load(tokenizer_folder).fingerprint
        if PromptTokenizer.load(source.tokenizer_folder).fingerprint != ours:
            raise ConfigError(
                f"forgetting.data={wanted.data} was made with another tokenizer than the model's; "
                f"prepare it again with tokenizer.path={tokenizer_folder}"
            )
    rows = {**to_mapping(config), "validation_rows": wanted.rows}
    batches = source.validation(build(TrainConfig, rows, where="forgetting"))
    if not batches:
        raise ConfigError(
            f"forgetting.data={wanted.data} holds no held-out rows that fit the model; name a "
            "folder with `heldout` (eval_size of its sources)"
        )
    return batches


class ForgettingCheck:
    """The rows of the check, and what the untouched base scored on them."""

    def __init__(self, batches: list[ValidationBatch]) -> None:
        self.batches = batches
        self.before: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: TrainConfig, tokenizer_folder: Path | None) -> ForgettingCheck | None:
        """The check that a run's config asks for; None: none. Errors as `forgetting_batches`."""
        if config.forgetting is None:
            return None
        return cls(forgetting_batches(config, config.forgetting, tokenizer_folder))

    def run(
        self,
        step: int,
        score: Callable[[list[ValidationBatch]], Mapping[str, Mapping[str, Any]]],
        earlier: Iterable[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any] | None:
        """Score the rows; the line of metrics.jsonl, or None where the log has it already.

        Args:
            score: gives `validate` of the `raw` and the `ema` weights. Every rank must come here.
            earlier: at the start of a session, the records of the log so far.
        """
        if earlier is not None:
            found = [r["before"] for r in earlier if r["kind"] == KIND]
            self.before = found[0] if found else None
            if step > 0:
                return None
        is_logged = step == 0 and self.before is not None
        # All ranks score together: whether they do must not depend on the log that one can read.
        scores = score(self.batches)
        raw, ema = ({key: scores[name][key] for key in QUANTITIES} for name in ("raw", "ema"))
        if step == 0:
            self.before = ema  # raw and averaged weights are the base's
        if is_logged:
            return None
        return {"kind": KIND, "step": step, "before": self.before, "after": ema, "after_raw": raw}


def compare(
    base: str,
    tuned: str,
    data: str | Path,
    *,
    rows: int,
    weights: str = "auto",
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Score two models on the same held-out rows of the base's mixture.

    Returns:
        `name`, `before` and `after` in total, then of each stratum.

    Raises:
        CheckpointError: no such model. DataError, ConfigError: as `forgetting_batches`.
    """
    place = pick_device(device)
    wanted = build(ForgettingConfig, {"data": str(data), "rows": rows}, where="forgetting")
    scores = []
    for path in (base, tuned):
        stored = open_stored(local_path(path), weights)
        shape = {"model": to_mapping(stored.config), "bp_first": 2, "bp_last": 2}
        if stored.config.num_stack_calls < 2:
            shape |= {"bp_first": 1, "bp_last": 1}
        batches = forgetting_batches(
            build(TrainConfig, shape, where=path), wanted, stored.tokenizer_folder
        )
        dtype = pick_dtype(None, place)
        model = stored.load_model(place, dtype)
        scores.append(validate(model, batches, device=place, dtype=dtype))
        del model
    before, after = scores
    found = [{"name": "all strata", "before": before, "after": after}]
    for name, value in before["by_stratum"].items():
        found.append({"name": name, "before": value, "after": after["by_stratum"][name]})
    return found


def describe(found: Mapping[str, Any], name: str = "the base's mixture") -> str:
    """`loss 0.11 -> 0.31, tokens right 97.0% -> 90.1%, answers right 92.0% -> 71.0%`."""
    before, after = found["before"], found["after"]
    if before is None:
        parts = [
            f"loss {after['loss']:.4f}",
            f"tokens right {100 * after['token_accuracy']:.1f}%",
            f"answers right {100 * after['exact_answer']:.1f}%",
        ]
    else:
        parts = [
            f"loss {before['loss']:.4f} -> {after['loss']:.4f}",
            f"tokens right {100 * before['token_accuracy']:.1f}% -> "
            f"{100 * after['token_accuracy']:.1f}%",
            f"answers right {100 * before['exact_answer']:.1f}% -> "
            f"{100 * after['exact_answer']:.1f}%",
        ]
    return f"{name}, {after['rows']} rows: {', '.join(parts)}"
