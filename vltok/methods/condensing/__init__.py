"""Methods that make fewer visual tokens in the projector."""

from vltok.methods.condensing.average_pool import AveragePool
from vltok.methods.condensing.pixel_shuffle import PixelShuffle
from vltok.methods.condensing.token_packer import TokenPacker

__all__ = ["AveragePool", "PixelShuffle", "TokenPacker"]
