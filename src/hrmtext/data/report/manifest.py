"""manifest.json of a prepared folder: what it was made from, and checksums of every file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hrmtext.config.base import load, to_mapping
from hrmtext.config.data import DataConfig
from hrmtext.data.format import REPORT_FILE, SampledData, read_json
from hrmtext.data.report.audit import AUDITS_FOLDER
from hrmtext.data.report.collect import CONFIG_FILE
from hrmtext.data.sources.recipe.catalog import find_source
from hrmtext.data.workers import Progress
from hrmtext.runtime.io import write_json

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
BYTES_PER_READ = 1 << 22
NOT_STATED = "not stated"
REASONING_GYM_LICENCE = "Apache-2.0"


def write_manifest(folder: str | Path, progress: Progress | None = None) -> Path:
    """Write `manifest.json` into a prepared folder; the same folder gives the same bytes.

    Raises:
        DataError: not a prepared folder.
    """
    folder = Path(folder)
    config = load(DataConfig, folder / CONFIG_FILE)
    stages = read_json(folder / REPORT_FILE)
    data = SampledData.open(folder / "sampled")
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_about(path.relative_to(folder))
    ]
    total = sum(path.stat().st_size for path in files)
    done = 0
    listed = {}
    for path in files:
        size = path.stat().st_size
        listed[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": sha256(path)}
        done += size
        if progress is not None:
            progress("checksums of bytes", done, total)
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": data.fingerprint,
        "tokenizer": stages["tokenizer"],
        "rows_per_epoch": stages["sampled"]["rows_per_epoch"],
        "tokens_per_epoch": stages["sampled"]["tokens_per_epoch"],
        "sources": sources(config),
        "config": to_mapping(config),
        "files": listed,
    }
    write_json(folder / MANIFEST_FILE, manifest)
    return folder / MANIFEST_FILE


def sources(config: DataConfig) -> list[dict[str, Any]]:
    """Where rows came from, with licences: `not stated` where nobody has said."""
    found: list[dict[str, Any]] = [
        {"kind": "local", "path": source.path, "licence": source.licence or NOT_STATED}
        for source in config.local
    ]
    for asked in config.hub:
        source = find_source(asked.source)
        found.append(
            {
                "kind": "public",
                "source": source.name,
                "hub": source.hub,
                "revision": asked.revision,
                "licence": source.licence,
                "citation": source.citation,
            }
        )
    if config.reasoning_gym is not None:
        found.append(
            {"kind": "generated", "package": "reasoning-gym", "licence": REASONING_GYM_LICENCE}
        )
    return found


def sha256(path: Path) -> str:
    """Checksum as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(BYTES_PER_READ):
            digest.update(chunk)
    return digest.hexdigest()


def _is_about(path: Path) -> bool:
    """Whether a file is about the data and not of it, or is being written."""
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.parts[0] in (AUDITS_FOLDER, MANIFEST_FILE, "report.html")
