"""The backbones of the papers, which timm can create by name once this is imported.

import timm, vltok.models
model = timm.create_model("soft_tiny", num_classes=10)
"""

from vltok.models.soft import SoftTransformer

__all__ = ["SoftTransformer"]
