"""The one list of methods and families: every promise in test_contract.py is checked for each pair."""

from __future__ import annotations

from collections.abc import Callable

import tiny

import vltok

# With tau=1 stage 2 drops wherever text attends to anything but visual tokens: its path is taken for certain.
METHODS: dict[str, Callable[[], vltok.Method]] = {
    "todre": lambda: vltok.ToDRE(keep_ratio=0.3, tau=1.0, depth=0.5),
    "todre-stage-1": lambda: vltok.ToDRE(keep_ratio=0.3, relevance=False),
    "todre-stage-2": lambda: vltok.ToDRE(stages=(2,), tau=1.0, depth=(0.25, 0.75)),
    "todre-k-center": lambda: vltok.ToDRE(num_keep=3, strategy="k_center", pivot="farthest", relevance=False),
    "divprune": lambda: vltok.DivPrune(keep_ratio=0.3),
    "fastervlm": lambda: vltok.FasterVLM(keep_ratio=0.3),
    "random": lambda: vltok.RandomTokens(keep_ratio=0.3, seed=7),
    "stride": lambda: vltok.StrideTokens(num_keep=4),
}

FAMILIES: dict[str, tiny.TinyFamily] = {
    f"{family.name}-{'cls' if family.has_cls else 'no-cls'}": family for family in tiny.ALL
}
