"""The vision-tower families, by name."""

from vltok.families.table import Entry


def _alike(family: str, name: str, title: str, place: str, model_class: str, **facts: object) -> Entry:
    """A tower that is like others, of a model of transformers."""
    file, class_name = family.split(".")
    facts |= {"name": name, "title": title, "model_class": model_class}
    return Entry(f"transformers.models.{place}", file, class_name, facts)


_PATCHES, _INTERN, _IDEFICS = "transformers_vit.PatchesAlone", "transformers_vit.InternViT", "masked.Idefics"
_ALIKE = [
    _alike(_PATCHES, "janus_vision", "Janus", "janus", "JanusVisionModel"),
    _alike(_PATCHES, "ovis2_vision", "Ovis2", "ovis2", "Ovis2VisionModel", norms=("rms_norm1", "rms_norm2"), mlp="ffn"),
    _alike(
        _PATCHES,
        "granite_docling_vision",
        "Granite Docling",
        "granite_docling",
        "GraniteDoclingVisionModel",
        has_maps=True,
    ),
    _alike(_INTERN, "internvl_vision", "InternViT", "internvl", "InternVLVisionModel"),
    _alike(_INTERN, "qianfan_ocr_vision", "Qianfan-OCR", "qianfan_ocr", "QianfanOCRVisionModel"),
    _alike(_IDEFICS, "idefics2_vision", "Idefics2", "idefics2", "Idefics2VisionTransformer"),
    _alike(_IDEFICS, "idefics3_vision", "Idefics3, Aria", "idefics3", "Idefics3VisionTransformer"),
    _alike(_IDEFICS, "smolvlm_vision", "SmolVLM", "smolvlm", "SmolVLMVisionTransformer"),
]

TOWERS = {
    "clip": Entry("transformers.models.clip", "transformers_vit", "Clip"),
    "siglip": _alike(_PATCHES, "siglip", "SigLIP", "siglip", "SiglipVisionModel"),
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
