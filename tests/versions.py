"""since(): skips a test where the installed transformers has a fault of its own that the test would show."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

INSTALLED = Version(transformers.__version__)


def since(version: str, reason: str) -> pytest.MarkDecorator:
    """Run a test from this version of transformers on; below, `reason` holds with vltok or without."""
    return pytest.mark.skipif(Version(version) > INSTALLED, reason=f"transformers below {version}: {reason}")


orders_repeated_images = since("5.19", "images of repeated prompts come in the wrong order")
takes_encoded_images = since("5.18", "mm_encoder_outputs is not known, and passed over in silence")
chunks_prompts_with_images = since("5.23", "a prefill in chunks answers otherwise than at once")
