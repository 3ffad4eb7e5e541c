"""Where the recipes (`configs/`) are: inside the installed package, or in the repository."""

from __future__ import annotations

from pathlib import Path

from hrmtext.errors import ConfigError


def recipe(name: str) -> Path:
    """The path of a recipe, for example `data/quickstart.yaml`."""
    package = Path(__file__).parent.parent
    for folder in (package / "configs", package.parent.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"the recipe configs/{name} is not installed; reinstall hrm-text")
