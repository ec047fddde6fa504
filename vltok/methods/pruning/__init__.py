"""Methods that keep some of the visual tokens of every image."""

from vltok.methods.pruning.cdpruner import CDPruner
from vltok.methods.pruning.dart import DART
from vltok.methods.pruning.dart_decoder import DARTDecoder
from vltok.methods.pruning.divprune import DivPrune
from vltok.methods.pruning.evs import EVS, StrideFrames
from vltok.methods.pruning.fastervlm import FasterVLM
from vltok.methods.pruning.fastv import FastV
from vltok.methods.pruning.floors import RandomTokens, StrideTokens
from vltok.methods.pruning.holov import HoloV
from vltok.methods.pruning.mmtok import MMTok
from vltok.methods.pruning.otprune import OTPrune
from vltok.methods.pruning.pool import Pool
from vltok.methods.pruning.prumerge import PruMergePlus
from vltok.methods.pruning.pyramid_drop import PyramidDrop
from vltok.methods.pruning.question import TextSelector
from vltok.methods.pruning.rule import DecoderRule
from vltok.methods.pruning.scope import SCOPE
from vltok.methods.pruning.selector import Selector
from vltok.methods.pruning.sparsevlm import SparseVLM
from vltok.methods.pruning.todre import ToDRE
from vltok.methods.pruning.vidcom2 import VidCom2
from vltok.methods.pruning.visionzip import VisionZip
from vltok.methods.pruning.vispruner import VisPruner

__all__ = [
    "DART",
    "EVS",
    "SCOPE",
    "CDPruner",
    "DARTDecoder",
    "DecoderRule",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "HoloV",
    "MMTok",
    "OTPrune",
    "Pool",
    "PruMergePlus",
    "PyramidDrop",
    "RandomTokens",
    "Selector",
    "SparseVLM",
    "StrideFrames",
    "StrideTokens",
    "TextSelector",
    "ToDRE",
    "VidCom2",
    "VisPruner",
    "VisionZip",
]
