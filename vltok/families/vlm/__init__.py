"""The vision-language families: name -> (package that defines the model class, our file, our class in it)."""

VLMS = {
    "llava": ("transformers.models.llava", "llava", "Llava"),
    "llava_next": ("transformers.models.llava_next", "llava_next", "LlavaNext"),
    "llava_onevision": ("transformers.models.llava_onevision", "llava_onevision", "LlavaOnevision"),
    "qwen2_5_vl": ("transformers.models.qwen2_5_vl", "qwen2_5_vl", "Qwen2_5_VL"),
    "internvl": ("transformers.models.internvl", "internvl", "InternVL"),
}
