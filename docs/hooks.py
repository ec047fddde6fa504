"""For mkdocs: links to files of the repository outside docs/ lead to the repository's page."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Put the repository's address before links that leave docs/."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\]\({re.escape(up)}(?!\.\.)([^)]+)\)", rf"]({config.repo_url.rstrip('/')}/blob/main/\1)", markdown)
