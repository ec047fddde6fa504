"""TAP: token-aware average pooling before attention."""

from vltok.methods.tap.method import TAP

__all__ = ["TAP"]
