"""The methods, each in a file or folder of its own. Importing this package registers them all by name."""

from vltok.methods.adl import ADL
from vltok.methods.condensing import AveragePool, PixelShuffle, TokenPacker
from vltok.methods.pruning import (
    EVS,
    DARTDecoder,
    DecoderRule,
    DivPrune,
    FasterVLM,
    FastV,
    PyramidDrop,
    RandomTokens,
    Selector,
    SparseVLM,
    StrideFrames,
    StrideTokens,
    ToDRE,
)
from vltok.methods.soft import SOFT
from vltok.methods.tap import TAP

__all__ = [
    "ADL",
    "EVS",
    "SOFT",
    "TAP",
    "AveragePool",
    "DARTDecoder",
    "DecoderRule",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "PixelShuffle",
    "PyramidDrop",
    "RandomTokens",
    "Selector",
    "SparseVLM",
    "StrideFrames",
    "StrideTokens",
    "ToDRE",
    "TokenPacker",
]
