"""What the installed transformers, and the models of one version, call things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

# The KV cache is one word for models, decoder layers, attention, mask functions and outputs: `cache` from 5.24 on,
# `past_key_values` before. A model that says `cache` still takes the old word from its callers, but translates it
# inside `forward`, which is too late for a hook that runs before.
_OLD = "past_key_values"
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else _OLD
# Whether `generate` encodes images once; before, it does so with every word where there is no cache.
ENCODES_ONCE = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18)


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache that a call gets by keyword, or None; of two, the one transformers would take."""
    return kwargs.get(CACHE, kwargs.get(_OLD))
