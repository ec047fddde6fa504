"""TokenPacker: a projector that makes one visual token of every s x s region of patches."""

from vltok.methods.condensing.token_packer.method import TokenPacker

__all__ = ["TokenPacker"]
