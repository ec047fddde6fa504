"""Carries out what methods decide on models of transformers. Knows no family and no algorithm."""
