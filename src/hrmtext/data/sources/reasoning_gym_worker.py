"""A worker process that generates reasoning-gym items.

Some families walk through Python sets, whose order depends on PYTHONHASHSEED; workers fix it.
"""

from __future__ import annotations

import json
import random
from functools import lru_cache
from typing import Any

import numpy as np

from hrmtext.data.workers import serve
from hrmtext.errors import ConfigError


@lru_cache(maxsize=64)
def _dataset(family: str, config: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(family, seed=seed, size=size, **json.loads(config))


def generate(request: dict[str, Any]) -> list[Any]:
    """Items [start, stop) of a family: `[question, answer, metadata]`, or `{"error": text}`.

    `metadata` is given where it was asked for and survives JSON: after the round trip the family's
    scorer must still give full marks to the family's own answer. Otherwise it is None.

    Raises:
        ConfigError: the family refuses its settings.
    """
    config = json.dumps(request["config"], sort_keys=True)
    try:
        dataset = _dataset(request["family"], config, request["seed"], request["size"])
    except Exception as error:  # whatever the family's own check of its settings raises
        raise ConfigError(
            f"reasoning-gym family {request['family']!r} refuses its settings {config}: "
            f"{type(error).__name__}: {error}"
        ) from error
    items: list[Any] = []
    for index in range(request["start"], request["stop"]):
        # A few families draw from the global generators too.
        random.seed(request["seed"] + index)
        np.random.seed((request["seed"] + index) % 2**32)  # noqa: NPY002
        try:
            item = dataset[index]
        except Exception as error:  # counted by the caller; one bad item must not end the run
            items.append({"error": f"{type(error).__name__}: {error}"})
            continue
        answer = item["answer"]
        answer = answer if answer is None or isinstance(answer, str) else str(answer)
        metadata = _portable(dataset, item, answer) if request["with_metadata"] else None
        items.append([item["question"], answer, metadata])
    return items


def _portable(dataset: Any, item: dict[str, Any], answer: str | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    try:
        metadata = json.loads(json.dumps(item["metadata"], allow_nan=False))
        entry = {"question": item["question"], "answer": answer, "metadata": metadata}
        return metadata if dataset.score_answer(answer, entry) >= 1.0 else None
    except Exception:  # not JSON, or the scorer needs what JSON loses; the caller counts it
        return None


if __name__ == "__main__":
    serve(generate)
