"""Starting a run from another model's weights: fine-tuning, or pretraining gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts.adapters import BaseReference, fingerprint_of
from hrmtext.artifacts.dcp import DcpFolder
from hrmtext.artifacts.hub import local_path
from hrmtext.artifacts.names import place_of
from hrmtext.artifacts.opening import open_stored
from hrmtext.artifacts.stored import StoredModel
from hrmtext.artifacts.upstream import averaged_names
from hrmtext.config.base import build, read_values, to_mapping
from hrmtext.config.model import ModelConfig
from hrmtext.config.train import TrainConfig
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import ConfigError
from hrmtext.runtime.log import logger
from hrmtext.train.moments import OPTIMIZER_FILE, StoredParts, has_moments, open_moments
from hrmtext.train.parallel import Shards
from hrmtext.train.state import TrainState

MAX_INITIAL_SHARE = 0.05
"""A final average that holds more of the initial weights than this is worth a warning."""

_MAY_DIFFER = frozenset({"max_seq_len", "expansion", "intermediate_size", "embedding_scale"})
"""Fields that do not decide the shape, or do so through a derived value that is compared."""


_OTHER_FILES = {
    "variants": "a comparison; run it with `hrm-text ablate`",
    "reasoning_gym": "a data recipe; run it with `hrm-text data prepare`",
    "local": "a data recipe; run it with `hrm-text data prepare`",
    "sampling": "a data recipe; run it with `hrm-text data prepare`",
}
"""Keys that no training recipe has, and what a file that has them is."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A training config; with `init_from`, the model's shape is that of the model named there.

    What `model` says beside it (`max_seq_len`, for instance) is laid over that shape.

    Raises:
        ConfigError: as `hrmtext.config.base.load`. CheckpointError: no model at `init_from`.
    """
    values = read_values(path, overrides)
    for key, meant in _OTHER_FILES.items():
        if key in values:
            raise ConfigError(f"{path or 'overrides'} has a key {key!r}: it is {meant}")
    given = values.get("model") or {}
    if values.get("init_from") is not None and isinstance(given, dict) and "preset" not in given:
        stored = open_stored(local_path(str(values["init_from"])))
        values["model"] = {**to_mapping(stored.config), **given}
    return build(TrainConfig, values, where=str(path) if path is not None else "overrides")


def warn_of_slow_average(config: TrainConfig, total_steps: int) -> None:
    """Say so where the average of a run from fresh weights will hold too much of those."""
    kept = config.ema_decay**total_steps
    if kept > MAX_INITIAL_SHARE and config.init_from is None:
        logger.warning(
            "ema_decay=%g is slow for %d steps: at the end %.0f%% of the average are still the "
            "initial weights. Lower it to %.4g or less, or look at the raw weights",
            config.ema_decay, total_steps, 100 * kept, MAX_INITIAL_SHARE ** (1 / total_steps),
        )  # fmt: skip


@torch.no_grad()
def start_from(config: TrainConfig, state: TrainState, tokenizer_folder: Path | None) -> str:
    """Bring `state` to the weights that `config.init_from` names; the average starts there too.

    Args:
        tokenizer_folder: the data's tokenizer; it must give the ids that the model knows.

    Returns:
        A line that says what was taken.

    Raises:
        CheckpointError: no model there, or it is damaged.
        ConfigError: another shape, another tokenizer, or no optimizer state where it is wanted.
    """
    assert config.init_from is not None, "there is nothing to start from"
    stored = open_stored(local_path(config.init_from), config.init_weights)
    _require_same_shape(config, stored)
    _require_same_tokenizer(config, stored, tokenizer_folder)
    if config.lora is None:
        for name in (*state.names(), *state.shards.buffers):
            state.shards.assign(name, stored.tensor(name))
    else:  # every rank holds the frozen weights whole
        weights = state.model.state_dict()
        for name in stored.names():
            weights[name].copy_(stored.tensor(name))
        # A Hub id stays as it is: where its files lie differs from machine to machine.
        is_local = Path(config.init_from).exists()
        path = str(stored.folder) if is_local else config.init_from
        state.base = BaseReference(
            path=path, weights=stored.weights, fingerprint=fingerprint_of(stored)
        )
    what = {"only": "weights", "raw": "raw weights", "ema": "EMA weights"}[stored.weights]
    averages = dict(zip(state.names(), state.optimizer.averages(), strict=True))
    for name, parameter in state.names().items():
        averages[name].copy_(parameter)
    if config.init_optimizer:
        moments = _moments(stored, state.shards)
        state.optimizer.import_state(state.names(), moments, state.names())
        what += " and optimizer state"
    return f"{what} of {stored.folder} ({stored.kind})"


def _moments(stored: StoredModel, shards: Shards) -> StoredParts:
    """This rank's chunks of the optimizer state beside a model."""
    if has_moments(stored.folder):
        return open_moments(stored.folder, shards)
    names = {}
    if stored.kind == "upstream":
        store = DcpFolder(stored.folder)
        for quantity in ("exp_avg", "exp_avg_sq", "step"):
            found = averaged_names(store.entries, stored.config, quantity)
            for outside, full in found.items():
                place = place_of(outside, "upstream")
                assert place is not None, outside
                names[f"{quantity}.{place.name}"] = full
        if names:
            return StoredParts(store, shards, names)
    raise ConfigError(
        f"init_optimizer is set, but {stored.folder} holds no optimizer state; name a "
        f"checkpoint of hrm-text ({OPTIMIZER_FILE}) or of the public training code, or leave it out"
    )


def _require_same_shape(config: TrainConfig, stored: StoredModel) -> None:
    wanted, found = _shape(config.model.resolve()), _shape(stored.config)
    differences = [
        f"{key} is {wanted[key]} here and {found[key]} there"
        for key in wanted
        if wanted[key] != found[key]
    ]
    if differences:
        raise ConfigError(
            f"`model` is not the shape of init_from={config.init_from}: {'; '.join(differences)}. "
            "Leave `model` out of the recipe: it is then taken from there"
        )


def _shape(model: ModelConfig) -> dict[str, Any]:
    fields = {key: value for key, value in to_mapping(model).items() if key not in _MAY_DIFFER}
    return fields | {"mlp_size": model.mlp_size, "scale": model.scale}


def _require_same_tokenizer(
    config: TrainConfig, stored: StoredModel, tokenizer_folder: Path | None
) -> None:
    if tokenizer_folder is None or stored.tokenizer_folder is None:
        logger.warning(
            "the %s has no tokenizer, so it is not checked that both mean the same tokens",
            "data" if tokenizer_folder is None else "model in init_from",
        )
        return
    ours = PromptTokenizer.load(tokenizer_folder)
    theirs = PromptTokenizer.load(stored.tokenizer_folder)
    if ours.fingerprint != theirs.fingerprint:
        raise ConfigError(
            f"the data was tokenised by another tokenizer than that of init_from="
            f"{config.init_from}; prepare it again with tokenizer.path={stored.tokenizer_folder}"
        )
