"""Methods that keep some of the visual tokens of every image."""

from vltok.methods.pruning.divprune import DivPrune
from vltok.methods.pruning.evs import EVS, StrideFrames
from vltok.methods.pruning.fastervlm import FasterVLM
from vltok.methods.pruning.floors import RandomTokens, StrideTokens
from vltok.methods.pruning.pool import Pool
from vltok.methods.pruning.rule import DecoderRule
from vltok.methods.pruning.selector import Selector
from vltok.methods.pruning.todre import ToDRE

__all__ = [
    "EVS",
    "DecoderRule",
    "DivPrune",
    "FasterVLM",
    "Pool",
    "RandomTokens",
    "Selector",
    "StrideFrames",
    "StrideTokens",
    "ToDRE",
]
