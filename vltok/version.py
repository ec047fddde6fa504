"""The version of vltok."""

__version__ = "0.1.0"
