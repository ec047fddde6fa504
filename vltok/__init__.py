"""vltok compresses the visual tokens of vision-language models: one call puts a method on, one call takes it off.

    handle = vltok.apply(model, vltok.ToDRE(keep_ratio=0.1))
    ...
    handle.remove()

Importing it loads torch only; transformers arrives with the model you hand in.
"""

from vltok import errors, nn
from vltok.api import apply
from vltok.families import register_family, supported_models
from vltok.handle import Handle, handles, remove
from vltok.method import Method, register
from vltok.methods import (
    ADL,
    DART,
    EVS,
    SCOPE,
    SOFT,
    TAP,
    AveragePool,
    CDPruner,
    DARTDecoder,
    DecoderRule,
    DivPrune,
    FasterVLM,
    FastV,
    HoloV,
    MMTok,
    OTPrune,
    PixelShuffle,
    Pool,
    PruMergePlus,
    PyramidDrop,
    RandomTokens,
    Selector,
    SparseVLM,
    StrideFrames,
    StrideTokens,
    TextSelector,
    ToDRE,
    TokenPacker,
    ToMe,
    VidCom2,
    VisionZip,
    VisPruner,
)
from vltok.report import Report
from vltok.resizing import Resizing, resize
from vltok.serialization import from_pretrained, load, save
from vltok.version import __version__
from vltok.visual import DecoderState, Selection, VisualTokens

__all__ = [
    "ADL",
    "DART",
    "EVS",
    "SCOPE",
    "SOFT",
    "TAP",
    "AveragePool",
    "CDPruner",
    "DARTDecoder",
    "DecoderRule",
    "DecoderState",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "Handle",
    "HoloV",
    "MMTok",
    "Method",
    "OTPrune",
    "PixelShuffle",
    "Pool",
    "PruMergePlus",
    "PyramidDrop",
    "RandomTokens",
    "Report",
    "Resizing",
    "Selection",
    "Selector",
    "SparseVLM",
    "StrideFrames",
    "StrideTokens",
    "TextSelector",
    "ToDRE",
    "ToMe",
    "TokenPacker",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "VisualTokens",
    "__version__",
    "apply",
    "errors",
    "from_pretrained",
    "handles",
    "load",
    "nn",
    "register",
    "register_family",
    "remove",
    "resize",
    "save",
    "supported_models",
]
