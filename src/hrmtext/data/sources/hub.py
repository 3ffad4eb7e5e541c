"""Raw rows of a source from the Hugging Face Hub, streamed by `datasets`, not kept on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from hrmtext.data.sources.files import RawRows, require_columns
from hrmtext.data.sources.source import Origin, Source
from hrmtext.errors import BackendError, DataError


class HubUnit(NamedTuple):
    """What one call of `datasets.load_dataset` reads."""

    origin: Origin
    config: str | None
    split: str | None
    data_files: str | None
    """A file of the repository, where it is read by itself."""


def hub_units(source: Source, repository: str, revision: str | None = None) -> list[HubUnit]:
    """The configs and splits of a source, or its files where they are read one by one.

    Args:
        repository: id of a Hub data set, or a local folder of the same layout.

    Raises:
        DataError: the Hub cannot be reached or does not have it. BackendError: no `datasets`.
    """
    if not source.by_file:
        return [HubUnit(Origin(p.name), p.config, p.split, None) for p in source.parts]
    units = []
    _require_datasets(source)
    with _explained(source, repository):
        names = _list_files(repository, revision)
        for part in source.parts:
            for name in names:
                if any(PurePosixPath(name).match(pattern) for pattern in part.files):
                    units.append(HubUnit(Origin(part.name, name), None, "train", name))
    if not units:
        wanted = ", ".join(pattern for part in source.parts for pattern in part.files)
        raise DataError(f"source {source.name}: {repository} holds none of its files: {wanted}")
    return units


def hub_rows(
    source: Source, unit: HubUnit, repository: str, revision: str | None = None
) -> RawRows:
    """Raw rows of one unit, in the Hub's order.

    Raises:
        DataError: the Hub cannot be reached, or the data lack a column that the source needs.
        BackendError: `datasets` is not installed.
    """
    datasets = _require_datasets(source)
    at = unit.data_files or "/".join(name for name in (unit.config, unit.split) if name)
    place = f"{repository}:{at}" if at else repository
    number = 0
    with _explained(source, repository):
        loaded = datasets.load_dataset(
            repository, name=unit.config, split=unit.split, revision=revision, streaming=True,
            data_files=unit.data_files,
        )  # fmt: skip
        splits = [loaded] if unit.split is not None else list(loaded.values())
        for rows in splits:
            rows = rows.decode(False)  # a picture's presence counts, not its pixels
            if rows.column_names is not None:
                require_columns(source, rows.column_names, place)
            for row in rows:
                number += 1
                yield f"{place}:{number}", {k: row[k] for k in source.columns if k in row}


def _list_files(repository: str, revision: str | None) -> list[str]:
    if Path(repository).is_dir():
        root = Path(repository)
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    from huggingface_hub import HfApi

    return sorted(HfApi().list_repo_files(repository, repo_type="dataset", revision=revision))


def _require_datasets(source: Source) -> Any:
    try:
        import datasets
    except ImportError:
        raise BackendError(
            f"source {source.name}: reading the Hub needs datasets; install it: "
            "pip install 'hrm-text[data]', or set path to a local copy"
        ) from None
    return datasets


@contextlib.contextmanager
def _explained(source: Source, repository: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # The Hub's client lets its HTTP library's own errors through, which are no OSError; the
        # library is httpx or, from huggingface-hub 2.4 on, httpx2.
        known = isinstance(error, OSError | ValueError | RuntimeError | DatasetsError)
        if not known and not type(error).__module__.startswith("httpx"):
            raise
        raise DataError(
            f"source {source.name}: could not read {repository} ({type(error).__name__}: {error}). "
            "Check the connection and that you may read the data set, or set path to a local copy"
        ) from error
