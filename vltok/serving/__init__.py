"""Serving: visual tokens pruned or condensed where requests are batched by a server."""

from __future__ import annotations

from vltok.serving.overrides import vllm_overrides

__all__ = ["vllm_overrides"]
