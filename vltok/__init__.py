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
    EVS,
    SOFT,
    TAP,
    DecoderRule,
    DivPrune,
    FasterVLM,
    RandomTokens,
    Selector,
    StrideFrames,
    StrideTokens,
    ToDRE,
    TokenPacker,
    ToMe,
)
from vltok.report import Report
from vltok.serialization import from_pretrained, load, save
from vltok.version import __version__

__all__ = [
    "ADL",
    "EVS",
    "SOFT",
    "TAP",
    "DecoderRule",
    "DivPrune",
    "FasterVLM",
    "Handle",
    "Method",
    "RandomTokens",
    "Report",
    "Selector",
    "StrideFrames",
    "StrideTokens",
    "ToDRE",
    "ToMe",
    "TokenPacker",
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
    "save",
    "supported_models",
]
