"""Opening whatever holds a model: the form is recognised by content, and nothing is read yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts import adapters, hf_folder, upstream, weights
from hrmtext.artifacts.dcp import DcpFolder
from hrmtext.artifacts.gguf_file import MAGIC, open_gguf
from hrmtext.artifacts.hub import local_path
from hrmtext.artifacts.layout import BEST, LAST, RunFolder
from hrmtext.artifacts.safetensors_file import SafetensorsFile
from hrmtext.artifacts.stored import StoredModel, TensorStore, fit
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.runtime.io import require_complete

WHICH = weights.WHICH


def open_stored(
    path: str | Path, which: str = "auto", base: str | Path | None = None
) -> StoredModel:
    """Open what `path` holds; the form is told by its content.

    Args:
        path: a run folder (its newest complete checkpoint is taken, as with `RUN/last`; `RUN/best`
            is the one with the lowest validation loss), a native folder, a Hugging Face folder
            (fused, split or mixed; one file or sharded), a checkpoint folder of the public
            training code or one of its `fsdp2_epoch_N`, a GGUF file (quantised tensors come back
            as fp32), a run or checkpoint of adapters (the base with their updates added in,
            fp32).
        which: `raw`, `ema`, or `auto`: the EMA where there is one.
        base: where the base of adapters lies now; None: where it was when they were trained.

    Raises:
        CheckpointError: nothing to open, or it is incomplete, damaged or does not fit its config;
            for adapters also, when the first tensor is read, if the base is another one.
        ConfigError: an unknown `which`, or a base for a model that needs none.
    """
    if which not in WHICH:
        raise ConfigError(f"weights {which!r} are unknown; expected one of {', '.join(WHICH)}")
    if _is_gguf(Path(path)):
        if which != "auto":
            raise CheckpointError(
                f"{path} is a GGUF file with one set of weights; leave out weights={which}"
            )
        return open_gguf(path)
    folder = model_folder(path)
    if adapters.is_adapter_folder(folder):
        return _open_adapters(folder, which, base)
    if base is not None:
        raise ConfigError(f"{path} holds a whole model, not adapters: leave out base={base}")
    if (folder / weights.CONFIG_FILE).is_file():
        return _open_native(folder, which)
    if hf_folder.is_hf_folder(folder):
        return _open_hf(folder, which)
    return _open_upstream(folder, which)


def model_folder(path: str | Path) -> Path:
    """The folder that holds the weights `path` stands for.

    Raises:
        CheckpointError: nothing that can be loaded; the message says what was found instead.
    """
    path = Path(path)
    if not path.exists():
        if path.name in (BEST, LAST) and RunFolder(path.parent).exists:
            return RunFolder(path.parent).named(path.name)
        raise CheckpointError(f"no such folder: {path}")
    if not path.is_dir():
        what = "a GGUF file, which has no folder" if _is_gguf(path) else "a file"
        raise CheckpointError(f"{path} is {what}; expected the folder that holds a model")
    is_native = (path / weights.CONFIG_FILE).is_file()
    if is_native or hf_folder.is_hf_folder(path) or upstream.is_upstream_folder(path):
        return path
    run = RunFolder(path)
    if run.exists or run.checkpoints_folder.is_dir():
        return run.latest()
    if (path / hf_folder.CONFIG_FILE).is_file():
        kind = hf_folder.read_hf_values(path).get("model_type")
        raise CheckpointError(f"{path} holds a model of type {kind!r}, expected 'hrm_text'")
    raise CheckpointError(
        f"{path} holds no model: expected a run folder (config.yaml, checkpoints), a native model "
        "folder (model.yaml), a Hugging Face folder (config.json of type hrm_text) or a checkpoint "
        f"folder of the public training code ({upstream.CONFIG_FILE})"
    )


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def _open_native(folder: Path, which: str) -> StoredModel:
    require_complete(folder)
    config = weights.read_config(folder)
    files = {"raw": folder / weights.WEIGHTS_FILE, "ema": folder / weights.EMA_FILE}
    there = tuple(name for name, file in files.items() if file.is_file())
    chosen = _choose(which, there, folder)
    store = SafetensorsFile(files[chosen])
    has_tokenizer = (folder / weights.TOKENIZER_FILES[0]).is_file()
    return StoredModel(
        kind="native",
        folder=folder,
        config=config,
        weights=chosen,
        alternatives=there,
        tokenizer_folder=folder if has_tokenizer else None,
        gradient_routing=None,
        token_ids={},
        parts=fit(config, [store], ("fused",), str(files[chosen])),
    )


def _open_adapters(folder: Path, which: str, base: str | Path | None) -> StoredModel:
    require_complete(folder)
    config = weights.read_config(folder)
    reference, _ = adapters.read_base(folder)
    where = reference.path if base is None else str(base)
    chosen = "raw" if reference.weights == "raw" else "auto"
    try:
        stored = open_stored(local_path(where), chosen)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} holds adapters, and their base cannot be opened ({error}); say where it is "
            "(base=, or --base)"
        ) from None
    store = adapters.AdaptedStore(stored, folder, "raw" if which == "raw" else "ema")
    has_tokenizer = (folder / weights.TOKENIZER_FILES[0]).is_file()
    return StoredModel(
        kind="adapters",
        folder=folder,
        config=config,
        weights=store.which,
        alternatives=("raw", "ema"),
        tokenizer_folder=folder if has_tokenizer else stored.tokenizer_folder,
        gradient_routing=stored.gradient_routing,
        token_ids=stored.token_ids,
        parts=fit(config, [store], ("fused",), str(folder)),
    )


def _open_hf(folder: Path, which: str) -> StoredModel:
    if which == "ema":
        raise CheckpointError(
            f"{folder} is a Hugging Face folder with one set of weights; leave out weights=ema"
        )
    values = hf_folder.read_hf_values(folder)
    config = hf_folder.from_hf_config(values, where=str(folder / hf_folder.CONFIG_FILE))
    stores = open_shards(folder)
    has_tokenizer = (folder / weights.TOKENIZER_FILES[0]).is_file()
    return StoredModel(
        kind="hf",
        folder=folder,
        config=config,
        weights="only",
        alternatives=("only",),
        tokenizer_folder=folder if has_tokenizer else None,
        gradient_routing=hf_folder.gradient_routing(values),
        token_ids=_token_ids(values),
        parts=fit(config, stores, ("fused", "split"), str(folder)),
    )


def _open_upstream(folder: Path, which: str) -> StoredModel:
    root, epoch = upstream.upstream_root(folder), upstream.epoch_folder(folder)
    values, metadata = upstream.read_upstream_values(root)
    where = str(root / upstream.CONFIG_FILE)
    config = upstream.from_upstream(values, metadata, where)
    store = DcpFolder(epoch)
    averages = upstream.averaged_names(store.entries, config)
    there = ("raw", "ema") if averages else ("raw",)
    chosen = _choose(which, there, epoch)
    view = _Renamed(store, upstream.weight_names(store.entries, averages, chosen))
    info = metadata.get("tokenizer_info") or {}
    return StoredModel(
        kind="upstream",
        folder=epoch,
        config=config,
        weights=chosen,
        alternatives=there,
        tokenizer_folder=_upstream_tokenizer(root, info),
        gradient_routing=upstream.upstream_routing(values["arch"], config),
        token_ids={},
        parts=fit(config, [view], ("upstream",), str(epoch)),
    )


class _Renamed:
    """A store under other names; the rest of it is left out."""

    def __init__(self, store: TensorStore, names: Mapping[str, str]) -> None:
        self.store, self.names = store, names
        self.entries = {name: store.entries[inner] for name, inner in names.items()}

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.store.read(self.names[name], out)


def open_shards(folder: Path) -> list[SafetensorsFile]:
    """The weights files of a Hugging Face folder: one, or those that its index names.

    Raises:
        CheckpointError: none there, one truncated, or an index that does not fit its shards.
    """
    single, index = folder / hf_folder.WEIGHTS_FILE, folder / hf_folder.INDEX_FILE
    if single.is_file():
        return [SafetensorsFile(single)]
    if not index.is_file():
        raise CheckpointError(
            f"{folder} has neither {hf_folder.WEIGHTS_FILE} nor {hf_folder.INDEX_FILE}"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from None
    stores = []
    for file in wanted:
        if Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, a file outside its folder")
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{index} names the shard {file}, which is not there; copy the folder again"
            )
        stores.append(SafetensorsFile(folder / file))
    by_file = {store.path.name: store for store in stores}
    missing = [n for n, file in weight_map.items() if n not in by_file[file].entries]
    if missing:
        raise CheckpointError(f"{index} names tensors that no shard holds: {missing[:5]}")
    return stores


def _choose(which: str, there: tuple[str, ...], folder: Path) -> str:
    if which == "auto":
        return "ema" if "ema" in there else "raw"
    if which not in there:
        raise CheckpointError(
            f"{folder} has no {which} weights, only {', '.join(there) or 'none'}: ask for those"
        )
    return which


def _token_ids(values: Mapping[str, Any]) -> dict[str, int]:
    found = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(key)
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, int):
            found[key] = value
    return found


def _upstream_tokenizer(root: Path, info: Mapping[str, Any]) -> Path | None:
    """Beside the config, else where the metadata says; it may name the file or its folder."""
    stated = Path(str(info.get("tokenizer_path") or "."))
    for folder in (root, stated, stated.parent, root / stated):
        if (folder / weights.TOKENIZER_FILES[0]).is_file():
            return folder
    return None
