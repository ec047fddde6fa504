"""Tiny models of further families, with their real processors where these can be built offline."""
