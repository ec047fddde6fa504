"""The one list of methods and families: every promise in test_contract.py is checked for each pair."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from towers import draw

import vltok

# With tau=1 stage 2 drops wherever text attends to anything but visual tokens: its path is taken for certain.
PRUNING: dict[str, Callable[[], vltok.Method]] = {
    "todre": lambda: vltok.ToDRE(keep_ratio=0.3, tau=1.0, depth=0.5),
    "todre-stage-1": lambda: vltok.ToDRE(keep_ratio=0.3, relevance=False),
    "todre-stage-2": lambda: vltok.ToDRE(stages=(2,), tau=1.0, depth=(0.25, 0.75)),
    "todre-k-center": lambda: vltok.ToDRE(num_keep=3, strategy="k_center", pivot="farthest", relevance=False),
    "divprune": lambda: vltok.DivPrune(keep_ratio=0.3),
    "fastervlm": lambda: vltok.FasterVLM(keep_ratio=0.3),
    "random": lambda: vltok.RandomTokens(keep_ratio=0.3, seed=7),
    "stride": lambda: vltok.StrideTokens(num_keep=4),
}
# These bring weights. Each gets the family, as not every setting fits every patch grid.
TRAINED: dict[str, Callable[[tiny.TinyFamily], vltok.Method]] = {
    "tokenpacker": lambda family: vltok.TokenPacker(scale_factor=3 if family is tiny.LLAVA_NEXT else 2),
    "soft": lambda family: vltok.SOFT(ratio=2),
    "tap": lambda family: vltok.TAP(num_scales=3),
}

FAMILIES: dict[str, tiny.TinyFamily] = {
    f"{family.name}-{'cls' if family.has_cls else 'no-cls'}": family for family in tiny.ALL
}


@functools.lru_cache
def _writer(family: tiny.TinyFamily) -> torch.nn.Module:
    """A model for processors to be set up with, while the one under test may have the method on already."""
    return family.model()


@dataclass(frozen=True)
class Pair:
    """One method on one family."""

    family: tiny.TinyFamily
    method: vltok.Method
    prunes: bool

    def apply(self, model: torch.nn.Module, processor: Any = None) -> vltok.Handle:
        """Apply the method; weights it brings are drawn large, the same at every call."""
        return draw(vltok.apply(model, self.method, processor=processor or self.family.processor()))

    def inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Process prompts as the processor does while the method is on."""
        processor = self.family.processor()
        with vltok.apply(_writer(self.family), self.method, processor=processor):
            return self.family.inputs(*args, **kwargs, processor=processor)


REFUSED = {(name, key) for name in TRAINED for key in ("qwen2_5_vl-no-cls", "internvl-cls")}
REFUSED |= {(name, "llava_onevision-no-cls") for name in PRUNING}
EVERY: dict[tuple[str, str], Pair] = {
    **{(name, key): Pair(family, make(), True) for name, make in PRUNING.items() for key, family in FAMILIES.items()},
    **{
        (name, key): Pair(family, make(family), False)
        for name, make in TRAINED.items()
        for key, family in FAMILIES.items()
    },
}
PAIRS = {f"{key}-{name}": pair for (name, key), pair in EVERY.items() if (name, key) not in REFUSED}
