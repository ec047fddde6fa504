"""The methods, one per file. Importing this package registers them all by name."""

from vltok.methods.adl import ADL
from vltok.methods.divprune import DivPrune
from vltok.methods.fastervlm import FasterVLM
from vltok.methods.random_tokens import RandomTokens
from vltok.methods.soft import SOFT
from vltok.methods.stride import StrideTokens
from vltok.methods.tap import TAP
from vltok.methods.todre import ToDRE
from vltok.methods.token_packer import TokenPacker

__all__ = ["ADL", "SOFT", "TAP", "DivPrune", "FasterVLM", "RandomTokens", "StrideTokens", "ToDRE", "TokenPacker"]
