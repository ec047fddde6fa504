"""Methods that make fewer visual tokens in the projector."""

from vltok.methods.condensing.token_packer import TokenPacker

__all__ = ["TokenPacker"]
