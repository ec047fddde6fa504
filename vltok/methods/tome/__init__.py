"""ToMe: merging of similar tokens inside a vision tower."""

from vltok.methods.tome.method import ToMe

__all__ = ["ToMe"]
