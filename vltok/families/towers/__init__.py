"""The vision-tower families, by name."""

from vltok.families.table import Entry


def _alike(class_name: str, name: str, model: str, model_class: str, file: str, **facts: object) -> Entry:
    """A tower that is like others, of a model of transformers."""
    facts |= {"name": name, "model_class": model_class}
    return Entry(f"transformers.models.{model}", file, class_name, facts)


_ALIKE = [
    _alike("PatchesAlone", "janus_vision", "janus", "JanusVisionModel", "transformers_vit"),
    _alike("PatchesAlone", "ovis2_vision", "ovis2", "Ovis2VisionModel", "transformers_vit", first_norm="rms_norm1"),
    _alike(
        "PatchesAlone",
        "granite_docling_vision",
        "granite_docling",
        "GraniteDoclingVisionModel",
        "transformers_vit",
    ),
    _alike("InternViT", "internvl_vision", "internvl", "InternVLVisionModel", "transformers_vit"),
    _alike("InternViT", "qianfan_ocr_vision", "qianfan_ocr", "QianfanOCRVisionModel", "transformers_vit"),
    _alike("Idefics", "idefics2_vision", "idefics2", "Idefics2VisionTransformer", "masked"),
    _alike("Idefics", "idefics3_vision", "idefics3", "Idefics3VisionTransformer", "masked"),
    _alike("Idefics", "smolvlm_vision", "smolvlm", "SmolVLMVisionTransformer", "masked"),
]

TOWERS = {
    "clip": Entry("transformers.models.clip", "transformers_vit", "Clip"),
    "siglip": _alike("PatchesAlone", "siglip", "siglip", "SiglipVisionModel", "transformers_vit"),
    "vit": Entry("transformers.models.vit", "transformers_vit", "ViT"),
    "dinov2": Entry("transformers.models.dinov2", "transformers_vit", "Dinov2"),
    "dinov2_with_registers": Entry(
        "transformers.models.dinov2_with_registers", "transformers_vit", "Dinov2WithRegisters"
    ),
    "siglip2": Entry("transformers.models.siglip2", "masked", "Siglip2"),
    "pixtral": Entry("transformers.models.pixtral", "masked", "Pixtral"),
    **{entry.facts["name"]: entry for entry in _ALIKE},
    "timm_vit": Entry("timm.models.vision_transformer", "timm_vit", "VisionTransformer"),
    "timm_eva": Entry("timm.models.eva", "timm_vit", "Eva"),
    "tap_backbone": Entry("vltok.models.tap_layers", "tap_backbone", "TapBackbone"),
}
