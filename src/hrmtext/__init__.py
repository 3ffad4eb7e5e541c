"""HRM-Text: train, fine-tune, evaluate, convert and serve hierarchical recurrent language models.

    model = hrmtext.load("runs/quickstart")
    model.generate("What is 12 + 30?", condition="direct")

`load`, `TextModel` and `Generated` are imported when first used, so that `import hrmtext` does not
import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrmtext.api import Generated, TextModel, load

__version__ = "0.1.0"
__all__ = ["Generated", "TextModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Generated", "TextModel", "load"):
        from hrmtext import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
