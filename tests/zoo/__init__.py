"""Tiny models of further families, with their real processors where these can be built offline."""

from __future__ import annotations

from zoo import gemma, glm, late, qwen, tiles

ROWS = [*qwen.ROWS, *tiles.ROWS, *gemma.ROWS, *glm.ROWS, *late.ROWS]
