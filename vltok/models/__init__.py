"""The backbones of the papers, which timm can create by name once this is imported.

import timm, vltok.models
model = timm.create_model("soft_tiny", num_classes=10)
model = timm.create_model("tap_fan_base_16_p4_hybrid", num_classes=10)
"""

from vltok.models.soft import SoftTransformer
from vltok.models.tap_fan import TapFan
from vltok.models.tap_rvt import TapRvt

__all__ = ["SoftTransformer", "TapFan", "TapRvt"]
