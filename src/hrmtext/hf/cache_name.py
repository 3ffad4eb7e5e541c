"""The name under which transformers hands caches around: it changed from release 5.24 on."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
)
"""`cache` (transformers 5.24 and newer) or `past_key_values`."""


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that was given under either name; ValueError where both were."""
    if cache is not None and past_key_values is not None:
        raise ValueError("expected one of cache and past_key_values, which is its older name")
    return past_key_values if cache is None else cache
