"""SOFT: softmax-free attention of linear cost."""

from vltok.methods.soft.method import SOFT

__all__ = ["SOFT"]
