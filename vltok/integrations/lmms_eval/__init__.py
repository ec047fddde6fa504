"""Models of lmms-eval with a method of vltok on them: `lmms-eval --model vltok_llava_hf`.

lmms-eval finds `manifests` by an entry point. Nothing else is imported here, as it is asked for in every run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODELS = {
    "vltok": "Vltok",
    "vltok_internvl_hf": "VltokInternVL",
    "vltok_llava_hf": "VltokLlava",
    "vltok_qwen2_5_vl": "VltokQwen2_5_VL",
    "vltok_qwen3_vl": "VltokQwen3_VL",
}


def manifests() -> list[ModelManifest]:
    """What lmms-eval is told of vltok's models: their names, and where the classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(name, chat_class_path=f"{__name__}.model.{cls}") for name, cls in MODELS.items()]
