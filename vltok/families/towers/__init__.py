"""The vision-tower families, by name."""

from vltok.families.table import Entry

TOWERS = {
    "clip": Entry("transformers.models.clip", "transformers_vit", "Clip"),
    "siglip": Entry("transformers.models.siglip", "transformers_vit", "Siglip"),
    "vit": Entry("transformers.models.vit", "transformers_vit", "ViT"),
    "dinov2": Entry("transformers.models.dinov2", "transformers_vit", "Dinov2"),
    "dinov2_with_registers": Entry(
        "transformers.models.dinov2_with_registers", "transformers_vit", "Dinov2WithRegisters"
    ),
    "timm_vit": Entry("timm.models.vision_transformer", "timm_vit", "VisionTransformer"),
    "timm_eva": Entry("timm.models.eva", "timm_vit", "Eva"),
    "tap_backbone": Entry("vltok.models.tap_layers", "tap_backbone", "TapBackbone"),
}
