"""Models named by their id on the Hugging Face Hub: `owner/name`, or `owner/name@revision`."""

from __future__ import annotations

import re
from pathlib import Path

from hrmtext.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Weights as safetensors only: other files of a repository may run code when loaded.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.yaml", "*.model", "*.txt"]


def local_path(path: str | Path) -> Path:
    """`path` itself, or where the Hub's files lie if it is no path here but looks like a Hub id.

    A name whose first part is a folder here (`runs/mine`) is taken as a path, never as an id.

    Raises:
        CheckpointError: the id cannot be fetched: no network, no such repository, no permission.
    """
    text = str(path)
    local = Path(path)
    if local.exists() or not _ID.fullmatch(text) or local.parent.exists():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = text.partition("@")
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=_WANTED)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{text} is no folder here, and it could not be fetched from the Hugging Face Hub "
            f"({first[0]}). Give the path of a folder, or connect to the network; a download made "
            "earlier is used without one"
        ) from None
    return Path(found)
