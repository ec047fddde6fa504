"""The vision-language families, by their model type in transformers.

A family that shows all that vltok needs is a line here. What can't be seen is told by a fact: `unit` and `gap`, see
`vltok.families.vlm.base.VlmFamily`; or, where a fact won't do, by a file of its own.
"""

from vltok.families.table import Entry


def _generic(name: str, title: str, model_class: str, **facts: object) -> Entry:
    facts |= {"name": name, "title": title, "model_classes": (model_class,)}
    file, family = facts.pop("file", "generic"), facts.pop("family", "Generic")
    return Entry(f"transformers.models.{name}", file, family, facts)


_GENERIC = [
    _generic("aria", "Aria", "AriaModel", unit="run"),
    _generic("aya_vision", "Aya Vision", "AyaVisionModel", unit="run", gap=1),
    _generic("cohere2_vision", "Command A Vision", "Cohere2VisionModel", unit="run", gap=1),
    _generic("cosmos3_omni", "Cosmos 3 Omni", "Cosmos3OmniModel"),
    _generic("deepseek_vl", "DeepSeek-VL", "DeepseekVLModel"),
    _generic("deepseek_vl_hybrid", "DeepSeek-VL Hybrid", "DeepseekVLHybridModel"),
    _generic("exaone4_5", "EXAONE 4.5", "Exaone4_5_Model"),
    _generic("fast_vlm", "FastVLM", "FastVlmModel"),
    _generic("gemma3", "Gemma 3", "Gemma3Model"),
    _generic("gemma3n", "Gemma 3n", "Gemma3nModel"),
    _generic("gemma4", "Gemma 4", "Gemma4Model"),
    _generic("glm46v", "GLM-4.6V", "Glm46VModel"),
    _generic("glm4v", "GLM-4V", "Glm4vModel"),
    _generic("glm4v_moe", "GLM-4.5V", "Glm4vMoeModel"),
    _generic("glm_ocr", "GLM-OCR", "GlmOcrModel"),
    _generic("got_ocr2", "GOT-OCR2", "GotOcr2Model", unit="run"),
    _generic("granite_docling", "Granite Docling", "GraniteDoclingModel", unit="row", family="GraniteDocling"),
    _generic("hunyuan_vl", "HunYuan-VL", "HunYuanVLModel"),
    _generic("hyperclovax_vision_v2", "HyperCLOVA X Vision", "HyperCLOVAXVisionV2Model"),
    _generic("idefics2", "Idefics2", "Idefics2Model", unit="row", gap=1),
    _generic("idefics3", "Idefics3", "Idefics3Model", unit="row", family="Idefics3"),
    _generic("janus", "Janus", "JanusModel"),
    _generic("kimi_k25", "Kimi K2.5", "Kimi_K25Model", gap=16),
    _generic("lfm2_vl", "LFM2-VL", "Lfm2VlModel", unit="run", gap=1),
    _generic("lfm3_vl", "LFM3-VL", "Lfm3VlModel"),
    _generic("lighton_ocr", "LightOnOCR", "LightOnOcrModel"),
    _generic("llava_next_video", "LLaVA-NeXT-Video", "LlavaNextVideoModel", file="llava_kin", family="LlavaNextVideo"),
    _generic("minicpmv4_6", "MiniCPM-V 4.6", "MiniCPMV4_6Model", unit="run", gap=3, family="MiniCpm"),
    _generic("minimax_m3_vl", "MiniMax-M3-VL", "MiniMaxM3VLModel", gap=16),
    _generic("mistral3", "Mistral 3", "Mistral3Model"),
    _generic("ovis2", "Ovis2", "Ovis2Model", unit="run", gap=1),
    _generic("paddleocr_vl", "PaddleOCR-VL", "PaddleOCRVLModel"),
    _generic("paligemma", "PaliGemma", "PaliGemmaModel"),
    _generic("perception_lm", "PerceptionLM", "PerceptionLMModel"),
    _generic("qianfan_ocr", "Qianfan-OCR", "QianfanOCRModel", unit="run"),
    _generic("qwen2_vl", "Qwen2-VL", "Qwen2VLModel"),
    _generic("qwen3_5", "Qwen3.5", "Qwen3_5Model"),
    _generic("qwen3_5_moe", "Qwen3.5-MoE", "Qwen3_5MoeModel"),
    _generic("qwen3_vl", "Qwen3-VL", "Qwen3VLModel"),
    _generic("qwen3_vl_moe", "Qwen3-VL-MoE", "Qwen3VLMoeModel"),
    _generic("smolvlm", "SmolVLM", "SmolVLMModel", unit="row", family="Idefics3"),
    _generic("step3p7", "Step-3.7", "Step3p7Model"),
    _generic("video_llama_3", "VideoLLaMA 3", "VideoLlama3Model"),
    _generic("video_llava", "Video-LLaVA", "VideoLlavaModel"),
    _generic("vipllava", "VipLLaVA", "VipLlavaModel", file="llava_kin", family="VipLlava"),
]

VLMS = {
    "llava": Entry("transformers.models.llava", "llava", "Llava"),
    "llava_next": Entry("transformers.models.llava_next", "llava_next", "LlavaNext"),
    "llava_onevision": Entry("transformers.models.llava_onevision", "llava_onevision", "LlavaOnevision"),
    "qwen2_5_vl": Entry("transformers.models.qwen2_5_vl", "qwen2_5_vl", "Qwen2_5_VL"),
    "internvl": Entry("transformers.models.internvl", "internvl", "InternVL"),
    **{entry.facts["name"]: entry for entry in _GENERIC},
}
