"""The vision-language families, by their model type in transformers.

A family that shows all that vltok needs is a line here. What can't be seen is told by a fact: `unit`, `gap` and
`patches`, see `vltok.families.vlm.base.VlmFamily`; or, where a fact won't do, by a file of its own. The other facts are
what people are told: `vltok.supported_models()`.
"""

from vltok.families.table import Entry


def _generic(name: str, title: str, model_class: str, **facts: object) -> Entry:
    facts |= {"name": name, "title": title, "model_classes": (model_class,)}
    file, family = facts.pop("file", "generic"), facts.pop("family", "Generic")
    return Entry(f"transformers.models.{name}", file, family, facts)


_GENERIC = [
    _generic("aria", "Aria", "AriaModel", unit="run"),
    _generic("aya_vision", "Aya Vision", "AyaVisionModel", unit="run", gap=1, patches="rows", windows=True),
    _generic(
        "cohere2_vision", "Command A Vision", "Cohere2VisionModel", unit="run", gap=1, patches="rows", windows=True
    ),
    _generic("cosmos3_omni", "Cosmos 3 Omni", "Cosmos3OmniModel", patches="blocks", videos="yes", axes=True),
    _generic("deepseek_vl", "DeepSeek-VL", "DeepseekVLModel", patches="rows"),
    _generic("deepseek_vl_hybrid", "DeepSeek-VL Hybrid", "DeepseekVLHybridModel", patches="rows"),
    _generic("exaone4_5", "EXAONE 4.5", "Exaone4_5_Model", patches="windows", videos="yes", windows=True),
    _generic("fast_vlm", "FastVLM", "FastVlmModel"),
    _generic("gemma3", "Gemma 3", "Gemma3Model", patches="rows", windows=True, also=("shieldgemma2",)),
    _generic("gemma3n", "Gemma 3n", "Gemma3nModel", windows=True),
    _generic("gemma4", "Gemma 4", "Gemma4Model", patches="rows", videos="yes", windows=True),
    _generic("glm46v", "GLM-4.6V", "Glm46VModel", patches="blocks", videos="yes", axes=True, also=("glmga",)),
    _generic("glm4v", "GLM-4V", "Glm4vModel", patches="blocks", videos="yes", axes=True),
    _generic("glm4v_moe", "GLM-4.5V", "Glm4vMoeModel", patches="blocks", videos="yes", axes=True),
    _generic("glm_ocr", "GLM-OCR", "GlmOcrModel", patches="blocks", videos="yes", axes=True),
    _generic("got_ocr2", "GOT-OCR2", "GotOcr2Model", unit="run", also=("pp_chart2table",)),
    _generic(
        "granite_docling", "Granite Docling", "GraniteDoclingModel", unit="row", patches="rows", family="GraniteDocling"
    ),
    _generic("hunyuan_vl", "HunYuan-VL", "HunYuanVLModel", patches="rows", family="HunYuanVl", axes=True),
    _generic(
        "hyperclovax_vision_v2", "HyperCLOVA X Vision", "HyperCLOVAXVisionV2Model", patches="windows", videos="yes"
    ),
    _generic("idefics2", "Idefics2", "Idefics2Model", unit="row", gap=1, windows=True),
    _generic("idefics3", "Idefics3", "Idefics3Model", unit="row", patches="rows", family="Idefics3"),
    _generic("janus", "Janus", "JanusModel", patches="rows"),
    _generic("kimi_k25", "Kimi K2.5", "Kimi_K25Model", gap=16, patches="rows", videos="yes"),
    _generic("lfm2_vl", "LFM2-VL", "Lfm2VlModel", unit="run", gap=1, patches="rows"),
    _generic("lfm3_vl", "LFM3-VL", "Lfm3VlModel", videos="yes", windows=True),
    _generic("lighton_ocr", "LightOnOCR", "LightOnOcrModel", patches="rows"),
    _generic(
        "minicpmv4_6",
        "MiniCPM-V 4.6",
        "MiniCPMV4_6Model",
        unit="run",
        gap=3,
        patches="rows",
        family="MiniCpm",
        videos="yes",
    ),
    _generic("minimax_m3_vl", "MiniMax-M3-VL", "MiniMaxM3VLModel", gap=16, patches="blocks", videos="yes"),
    _generic("mistral3", "Mistral 3", "Mistral3Model", patches="rows", windows=True),
    _generic("ovis2", "Ovis2", "Ovis2Model", unit="run", gap=1, patches="rows"),
    _generic("paddleocr_vl", "PaddleOCR-VL", "PaddleOCRVLModel", patches="rows", axes=True),
    _generic("paligemma", "PaliGemma", "PaliGemmaModel", patches="rows", windows=True),
    _generic(
        "perception_lm",
        "PerceptionLM",
        "PerceptionLMModel",
        patches="rows",
        family="PerceptionLm",
        videos="yes",
        cls="yes",
    ),
    _generic("qianfan_ocr", "Qianfan-OCR", "QianfanOCRModel", unit="run", patches="rows", cls="yes"),
    _generic("qwen2_5_vl", "Qwen2.5-VL", "Qwen2_5_VLModel", patches="windows", videos="yes", axes=True, windows=True),
    _generic("qwen2_vl", "Qwen2-VL", "Qwen2VLModel", patches="blocks", videos="yes", axes=True),
    _generic("qwen3_5", "Qwen3.5", "Qwen3_5Model", patches="blocks", videos="yes", axes=True),
    _generic("qwen3_5_moe", "Qwen3.5-MoE", "Qwen3_5MoeModel", patches="blocks", videos="yes", axes=True),
    _generic("qwen3_vl", "Qwen3-VL", "Qwen3VLModel", patches="blocks", videos="yes", axes=True),
    _generic("qwen3_vl_moe", "Qwen3-VL-MoE", "Qwen3VLMoeModel", patches="blocks", videos="yes", axes=True),
    _generic("smolvlm", "SmolVLM", "SmolVLMModel", unit="row", patches="rows", family="Idefics3", videos="frames"),
    _generic("step3p7", "Step-3.7", "Step3p7Model", windows=True),
    _generic("video_llama_3", "VideoLLaMA 3", "VideoLlama3Model", patches="blocks", videos="yes"),
    _generic(
        "video_llava", "Video-LLaVA", "VideoLlavaModel", patches="rows", family="VideoLlava", videos="yes", cls="yes"
    ),
    _generic(
        "vipllava",
        "VipLLaVA",
        "VipLlavaModel",
        patches="rows",
        cls="yes",
        file="vipllava",
        family="VipLlava",
    ),
]

VLMS = {
    "llava": Entry("transformers.models.llava", "llava", "Llava"),
    "llava_next": Entry("transformers.models.llava_next", "llava_next", "LlavaNext"),
    "llava_next_video": Entry("transformers.models.llava_next_video", "llava_next", "LlavaNextVideo"),
    "llava_onevision": Entry("transformers.models.llava_onevision", "llava_onevision", "LlavaOnevision"),
    "internvl": Entry("transformers.models.internvl", "internvl", "InternVL"),
    **{entry.facts["name"]: entry for entry in _GENERIC},
}

# Models without visual tokens among those that a decoder is given, and so without a family: their names, and why.
REFUSED = {
    "transformers.models.mllama": (
        "Mllama (Llama 3.2 Vision)",
        "its decoder looks at the image by cross-attention, so the prompt has no visual tokens that could be left out",
    ),
    "transformers.models.florence2": (
        "Florence-2",
        "its visual tokens enter the encoder of an encoder-decoder, whose decoder looks at them by cross-attention",
    ),
}
