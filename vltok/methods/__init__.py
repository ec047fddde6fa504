"""The methods, each in a file or folder of its own. Importing this package registers them all by name."""

from vltok.methods.adl import ADL
from vltok.methods.condensing import TokenPacker
from vltok.methods.pruning import (
    EVS,
    DecoderRule,
    DivPrune,
    FasterVLM,
    RandomTokens,
    Selector,
    StrideFrames,
    StrideTokens,
    ToDRE,
)
from vltok.methods.soft import SOFT
from vltok.methods.tap import TAP
from vltok.methods.tome import ToMe

__all__ = [
    "ADL",
    "EVS",
    "SOFT",
    "TAP",
    "DecoderRule",
    "DivPrune",
    "FasterVLM",
    "RandomTokens",
    "Selector",
    "StrideFrames",
    "StrideTokens",
    "ToDRE",
    "ToMe",
    "TokenPacker",
]
