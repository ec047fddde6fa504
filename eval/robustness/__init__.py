"""Robustness: image classifiers with and without vltok methods on corrupted, unusual and slightly moving pictures."""
