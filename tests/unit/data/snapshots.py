"""What a data folder holds, for comparing two of them."""

from __future__ import annotations

import json
from pathlib import Path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for times of change of cleaned files, and checksums of such times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.name in ("COMPLETE.json", "metadata.json", "manifest.json"):
            values = json.loads(data)
            for name in ("source_mtime", "source_mtime_ns"):
                values.pop(name, None)
            for name in [*values.get("files", {})]:
                if name.endswith(("COMPLETE.json", "metadata.json")):
                    del values["files"][name]
            data = json.dumps(values).encode()
        found[path.relative_to(folder).as_posix()] = data
    return found
