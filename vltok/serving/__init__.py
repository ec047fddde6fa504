"""Serving: visual-token pruning where requests are batched by a server."""
