"""Evaluation scripts: they use vltok's public names only."""
