"""The vision-language families, by their model type in transformers.

A family that shows all that vltok needs is a line here. What can't be seen is told by a fact: `unit`, `gap` and
`patches`, see
`vltok.families.vlm.base.VlmFamily`; or, where a fact won't do, by a file of its own.
"""

from vltok.families.table import Entry


def _generic(name: str, title: str, model_class: str, **facts: object) -> Entry:
    facts |= {"name": name, "title": title, "model_classes": (model_class,)}
    return Entry(f"transformers.models.{name}", "generic", facts.pop("family", "Generic"), facts)


_GENERIC = [
    _generic("aria", "Aria", "AriaModel", unit="run"),
    _generic("aya_vision", "Aya Vision", "AyaVisionModel", unit="run", gap=1, patches="rows"),
    _generic("cohere2_vision", "Command A Vision", "Cohere2VisionModel", unit="run", gap=1, patches="rows"),
    _generic("cosmos3_omni", "Cosmos 3 Omni", "Cosmos3OmniModel", patches="blocks"),
    _generic("deepseek_vl", "DeepSeek-VL", "DeepseekVLModel", patches="rows"),
    _generic("deepseek_vl_hybrid", "DeepSeek-VL Hybrid", "DeepseekVLHybridModel", patches="rows"),
    _generic("exaone4_5", "EXAONE 4.5", "Exaone4_5_Model", patches="windows"),
    _generic("fast_vlm", "FastVLM", "FastVlmModel"),
    _generic("gemma3", "Gemma 3", "Gemma3Model", patches="rows"),
    _generic("gemma3n", "Gemma 3n", "Gemma3nModel"),
    _generic("gemma4", "Gemma 4", "Gemma4Model", patches="rows"),
    _generic("glm46v", "GLM-4.6V", "Glm46VModel", patches="blocks"),
    _generic("glm4v", "GLM-4V", "Glm4vModel", patches="blocks"),
    _generic("glm4v_moe", "GLM-4.5V", "Glm4vMoeModel", patches="blocks"),
    _generic("glm_ocr", "GLM-OCR", "GlmOcrModel", patches="blocks"),
    _generic("got_ocr2", "GOT-OCR2", "GotOcr2Model", unit="run"),
    _generic(
        "granite_docling", "Granite Docling", "GraniteDoclingModel", unit="row", family="GraniteDocling", patches="rows"
    ),
    _generic("hunyuan_vl", "HunYuan-VL", "HunYuanVLModel", patches="rows", family="HunYuanVl"),
    _generic("hyperclovax_vision_v2", "HyperCLOVA X Vision", "HyperCLOVAXVisionV2Model", patches="windows"),
    _generic("idefics2", "Idefics2", "Idefics2Model", unit="row", gap=1),
    _generic("idefics3", "Idefics3", "Idefics3Model", unit="row", family="Idefics3", patches="rows"),
    _generic("janus", "Janus", "JanusModel", patches="rows"),
    _generic("kimi_k25", "Kimi K2.5", "Kimi_K25Model", gap=16, patches="rows"),
    _generic("lfm2_vl", "LFM2-VL", "Lfm2VlModel", unit="run", gap=1, patches="rows"),
    _generic("lfm3_vl", "LFM3-VL", "Lfm3VlModel"),
    _generic("lighton_ocr", "LightOnOCR", "LightOnOcrModel", patches="rows"),
    _generic("minicpmv4_6", "MiniCPM-V 4.6", "MiniCPMV4_6Model", unit="run", gap=3, patches="rows", family="MiniCpm"),
    _generic("minimax_m3_vl", "MiniMax-M3-VL", "MiniMaxM3VLModel", gap=16, patches="blocks"),
    _generic("mistral3", "Mistral 3", "Mistral3Model", patches="rows"),
    _generic("ovis2", "Ovis2", "Ovis2Model", unit="run", gap=1, patches="rows"),
    _generic("paddleocr_vl", "PaddleOCR-VL", "PaddleOCRVLModel", patches="rows"),
    _generic("paligemma", "PaliGemma", "PaliGemmaModel", patches="rows"),
    _generic("perception_lm", "PerceptionLM", "PerceptionLMModel", patches="rows", family="PerceptionLm"),
    _generic("qianfan_ocr", "Qianfan-OCR", "QianfanOCRModel", unit="run", patches="rows"),
    _generic("qwen2_5_vl", "Qwen2.5-VL", "Qwen2_5_VLModel", patches="windows"),
    _generic("qwen2_vl", "Qwen2-VL", "Qwen2VLModel", patches="blocks"),
    _generic("qwen3_5", "Qwen3.5", "Qwen3_5Model", patches="blocks"),
    _generic("qwen3_5_moe", "Qwen3.5-MoE", "Qwen3_5MoeModel", patches="blocks"),
    _generic("qwen3_vl", "Qwen3-VL", "Qwen3VLModel", patches="blocks"),
    _generic("qwen3_vl_moe", "Qwen3-VL-MoE", "Qwen3VLMoeModel", patches="blocks"),
    _generic("smolvlm", "SmolVLM", "SmolVLMModel", unit="row", family="Idefics3", patches="rows"),
    _generic("step3p7", "Step-3.7", "Step3p7Model"),
    _generic("video_llama_3", "VideoLLaMA 3", "VideoLlama3Model", patches="blocks"),
    _generic("video_llava", "Video-LLaVA", "VideoLlavaModel", patches="rows", family="VideoLlava"),
    _generic("vipllava", "VipLLaVA", "VipLlavaModel", patches="rows"),
]

VLMS = {
    "llava": Entry("transformers.models.llava", "llava", "Llava"),
    "llava_next": Entry("transformers.models.llava_next", "llava_next", "LlavaNext"),
    "llava_next_video": Entry("transformers.models.llava_next_video", "llava_next", "LlavaNextVideo"),
    "llava_onevision": Entry("transformers.models.llava_onevision", "llava_onevision", "LlavaOnevision"),
    "internvl": Entry("transformers.models.internvl", "internvl", "InternVL"),
    **{entry.facts["name"]: entry for entry in _GENERIC},
}
