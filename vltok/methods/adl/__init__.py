"""ADL: a loss that spreads attention."""

from vltok.methods.adl.method import ADL

__all__ = ["ADL"]
