"""Which models can be served pruned or condensed, and what a server calls them."""

from __future__ import annotations

from dataclasses import dataclass

TESTED = ("0.32.0",)  # the versions of vLLM that the tests ran with


@dataclass(frozen=True)
class Architecture:
    """A kind of model that vLLM serves pruned, or condensed.

    Attributes:
        name: What vLLM knows it by.
        module: The module of `vltok.serving.vllm` that has it.
        cls: Its class there.
        has_axes: Whether visual tokens have positions on several axes.
        videos: Whether videos are pruned, too.
    """

    name: str
    module: str
    cls: str
    has_axes: bool = False
    videos: bool = False


# By the `model_type` of the model's config.
ARCHITECTURES = {
    "llava": Architecture("VltokLlavaForConditionalGeneration", "llava", "PrunedLlava"),
    "llava_next": Architecture("VltokLlavaNextForConditionalGeneration", "llava_next", "PrunedLlavaNext"),
    "llava_onevision": Architecture(
        "VltokLlavaOnevisionForConditionalGeneration", "llava_onevision", "PrunedLlavaOnevision", videos=True
    ),
    "internvl": Architecture("VltokInternVLForConditionalGeneration", "internvl", "PrunedInternVL"),
    "qwen2_5_vl": Architecture(
        "VltokQwen2_5_VLForConditionalGeneration", "qwen", "PrunedQwen2_5_VL", has_axes=True, videos=True
    ),
    "qwen2_vl": Architecture(
        "VltokQwen2VLForConditionalGeneration", "qwen", "PrunedQwen2VL", has_axes=True, videos=True
    ),
    "qwen3_vl": Architecture(
        "VltokQwen3VLForConditionalGeneration", "qwen3", "PrunedQwen3VL", has_axes=True, videos=True
    ),
}
# Those with a condenser in the place of their projector.
CONDENSED = {"llava": Architecture("VltokCondensedLlavaForConditionalGeneration", "condensed", "CondensedLlava")}
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES.values()}
