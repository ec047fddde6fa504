"""The vision-tower families: name -> (module that defines the model class, our file, our class in it)."""

TOWERS = {
    "clip": ("transformers.models.clip", "transformers_vit", "Clip"),
    "siglip": ("transformers.models.siglip", "transformers_vit", "Siglip"),
    "vit": ("transformers.models.vit", "transformers_vit", "ViT"),
    "dinov2": ("transformers.models.dinov2", "transformers_vit", "Dinov2"),
    "dinov2_with_registers": ("transformers.models.dinov2_with_registers", "transformers_vit", "Dinov2WithRegisters"),
    "timm_vit": ("timm.models.vision_transformer", "timm_vit", "VisionTransformer"),
    "timm_eva": ("timm.models.eva", "timm_vit", "Eva"),
    "tap_backbone": ("vltok.models.tap_layers", "tap_backbone", "TapBackbone"),
}
