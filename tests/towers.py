"""Tiny vision towers of the real classes, made offline from configs, and the methods that change what they compute."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import signature
from typing import Any

import tiny
import torch
from torch import nn
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention

import vltok
from vltok.nn import SoftmaxFreeAttention

SIZE, PATCH = 32, 8  # 4 x 4 patches
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
HF = {**WIDTHS, "image_size": SIZE, "patch_size": PATCH}
TIMM = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


@dataclass(frozen=True)
class Tower:
    """One row of the tower axis of the vision matrix.

    Attributes:
        family: The family's name in vltok.
        build: Makes a model, given the attention implementation, "sdpa" or "eager".
        prefix: Tokens before the patches.
        is_hf: Whether it is a model of transformers, with a config that is saved with it.
        any_size: What to call it with for pictures of any size; None if it takes one size.
        call: The method that encodes pictures, where it isn't the model's call.
        read_past: Ends of the names of linear layers whose weights are read past their forward, so that adapters on
            them don't count.
        inputs: Makes of pictures, (B, 3, H, W), what the model is called with, where it isn't these.
        bare: The same without padding, where `inputs` pads.
        replaceable: Whether its attention can be replaced.
        mergeable: Whether its tokens can be merged.
        grid: Patches of a picture of the size that it is made for.
        loads: Whether transformers finds its class by its name.
    """

    family: str
    build: Callable[[str], nn.Module]
    prefix: int = 1
    is_hf: bool = True
    any_size: dict[str, Any] | None = field(default=None, hash=False)
    call: str = "__call__"
    read_past: tuple[str, ...] = ()
    inputs: Callable[[torch.Tensor], dict[str, Any]] | None = None
    bare: Callable[[torch.Tensor], dict[str, Any]] | None = None
    replaceable: bool = True
    mergeable: bool = True
    grid: tuple[int, int] = (4, 4)
    loads: bool = True

    def model(self, attention: str = "sdpa") -> nn.Module:
        """A model with sharp weights, in eval mode."""
        model = tiny.sharpen(self.build(attention))
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):  # of a layer scale
                parameter.data.mul_(10)
        return model

    def output(self, model: nn.Module, pixels: torch.Tensor, **options: Any) -> Any:
        """What the model returns for pictures, (B, 3, H, W)."""
        if self.inputs is not None:
            return getattr(model, self.call)(**self.inputs(pixels), **options)
        return getattr(model, self.call)(pixels, **options)

    def answer(self, model: nn.Module, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
        """The first tensor of what the model returns, (B, ...)."""
        output = self.output(model, pixels, **options)
        first = output if isinstance(output, torch.Tensor) else output[0]
        return first if len(first) == len(pixels) else first.view(len(pixels), -1, first.shape[-1])

    def checkpoint(self, model: nn.Module, reentrant: bool) -> bool:
        """Turn gradient checkpointing on; whether it is of the reentrant kind, which timm has no word for."""
        if not self.is_hf:
            model.set_grad_checkpointing()
            return False
        word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before 5.23
        settings = {f"{word}_checkpointing_kwargs": {"use_reentrant": reentrant}}
        getattr(model, f"{word}_checkpointing_enable")(**settings)
        return reentrant

    def tokens(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """The tokens after the last block, (B, prefix + patches, C): every weight of every block has a part in them."""
        if self.is_hf:
            return self.output(model, pixels, output_hidden_states=True).hidden_states[-1]
        return model.forward_features(pixels)


def _hf(name: str, config: str, module: str = "transformers", **extra: Any) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**{**HF, **extra}, attn_implementation=attention)
        return getattr(importlib.import_module(module), name)(settings)

    return build


def _siglip2(attention: str) -> nn.Module:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(**WIDTHS, patch_size=PATCH, num_patches=16, attn_implementation=attention)
    return Siglip2VisionModel(config)


def _clip_model(attention: str) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {**WIDTHS, "vocab_size": 20, "max_position_embeddings": 8, **ids}
    return CLIPModel(CLIPConfig(vision_config=HF, text_config=text, projection_dim=16, attn_implementation=attention))


def _timm(name: str, **extra: Any) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        import timm

        model = timm.create_model(name, **{**TIMM, **extra})
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = attention == "sdpa"
        return model

    return build


def patches(pixels: torch.Tensor, padding: int) -> dict[str, Any]:
    """Patches of pictures in rows, with some more behind them that are none."""
    grid = tuple(side // PATCH for side in pixels.shape[-2:])
    rows = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    mask = nn.functional.pad(torch.ones(rows.shape[:2], dtype=torch.long), (0, padding))
    return {
        "pixel_values": nn.functional.pad(rows, (0, 0, 0, padding), value=1.0),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([grid] * len(pixels)),
    }


def _framed(pixels: torch.Tensor) -> dict[str, Any]:
    """Pictures with a patch more to the right, and one below, that are none."""
    mask = torch.ones(len(pixels), *(side // PATCH for side in pixels.shape[-2:]), dtype=torch.bool)
    return {
        "pixel_values": nn.functional.pad(pixels, (0, PATCH, 0, PATCH), value=1.0),
        "patch_attention_mask": nn.functional.pad(mask, (0, 1, 0, 1)),
    }


# In older versions DINOv2's attention takes no mask.
MASKED_DINOV2 = "attention_mask" in signature(Dinov2Attention.forward).parameters
INTERPOLATE = {"interpolate_pos_encoding": True}
TOWERS: dict[str, Tower] = {
    "clip": Tower("clip", _hf("CLIPVisionModel", "CLIPVisionConfig"), any_size=INTERPOLATE),
    "siglip": Tower("siglip", _hf("SiglipVisionModel", "SiglipVisionConfig"), 0, any_size=INTERPOLATE),
    "vit": Tower("vit", _hf("ViTModel", "ViTConfig"), any_size=INTERPOLATE),
    "vit-classifier": Tower("vit", _hf("ViTForImageClassification", "ViTConfig", qkv_bias=False), any_size=INTERPOLATE),
    "dinov2": Tower("dinov2", _hf("Dinov2Model", "Dinov2Config"), any_size={}, mergeable=MASKED_DINOV2),
    "dinov2-swiglu": Tower(
        "dinov2", _hf("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True), any_size={}, mergeable=MASKED_DINOV2
    ),
    "dinov2-registers": Tower(
        "dinov2_with_registers",
        _hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=3),
        4,
        any_size={},
        mergeable=MASKED_DINOV2,
    ),
    "clip-model": Tower("clip", _clip_model, any_size=INTERPOLATE, call="get_image_features"),
    "internvit": Tower("internvl_vision", _hf("InternVLVisionModel", "InternVLVisionConfig"), any_size={}),
    "internvit-norms": Tower(
        "internvl_vision",
        _hf("InternVLVisionModel", "InternVLVisionConfig", use_qk_norm=True, norm_type="rms_norm"),
        any_size={},
        replaceable=False,
    ),
    "qianfan": Tower(
        "qianfan_ocr_vision", _hf("QianfanOCRVisionModel", "QianfanOCRVisionConfig", drop_path_rate=0.0), any_size={}
    ),
    "janus": Tower("janus_vision", _hf("JanusVisionModel", "JanusVisionConfig"), 0, any_size=INTERPOLATE),
    "ovis2": Tower(
        "ovis2_vision",
        _hf("Ovis2VisionModel", "Ovis2VisionConfig", "transformers.models.ovis2.modeling_ovis2", vocab_size=32),
        0,
        loads=False,
    ),
    "granite-docling": Tower(
        "granite_docling_vision", _hf("GraniteDoclingVisionModel", "GraniteDoclingVisionConfig"), 0, mergeable=False
    ),
    # Pictures that are padded, or stand in one row: with padding and without.
    "siglip2": Tower(
        "siglip2",
        _siglip2,
        0,
        any_size={},
        inputs=functools.partial(patches, padding=0),
        replaceable=False,
        mergeable=False,
    ),
    "siglip2-padded": Tower(
        "siglip2",
        _siglip2,
        0,
        any_size={},
        inputs=functools.partial(patches, padding=3),
        bare=functools.partial(patches, padding=0),
        replaceable=False,
        mergeable=False,
    ),
    "idefics2-padded": Tower(
        "idefics2_vision",
        _hf("Idefics2VisionTransformer", "Idefics2VisionConfig", "transformers.models.idefics2.modeling_idefics2"),
        0,
        any_size={},
        inputs=_framed,
        bare=lambda pixels: {"pixel_values": pixels},
        replaceable=False,
        mergeable=False,
        loads=False,
    ),
    "idefics3": Tower(
        "idefics3_vision",
        _hf("Idefics3VisionTransformer", "Idefics3VisionConfig"),
        0,
        any_size={},
        replaceable=False,
        mergeable=False,
    ),
    "smolvlm-padded": Tower(
        "smolvlm_vision",
        _hf("SmolVLMVisionTransformer", "SmolVLMVisionConfig"),
        0,
        any_size={},
        inputs=_framed,
        bare=lambda pixels: {"pixel_values": pixels},
        replaceable=False,
        mergeable=False,
    ),
    "pixtral": Tower(
        "pixtral",
        _hf("PixtralVisionModel", "PixtralVisionConfig", image_size=64),  # the largest that older versions tell apart
        0,
        any_size={},
        replaceable=False,
        mergeable=False,
        grid=(8, 8),
    ),
    "timm-vit": Tower("timm_vit", _timm("vit_tiny_patch16_224", dynamic_img_size=True), 1, False, {}),
    "timm-deit-distilled": Tower("timm_vit", _timm("deit_tiny_distilled_patch16_224"), 2, False),
    "timm-registers": Tower("timm_vit", _timm("vit_small_patch14_reg4_dinov2"), 5, False),
    "timm-no-class": Tower("timm_vit", _timm("vit_base_patch16_siglip_gap_224", dynamic_img_size=True), 0, False, {}),
    "timm-map": Tower("timm_vit", _timm("vit_base_patch16_siglip_224"), 0, False),
    "timm-eva": Tower(
        "timm_eva", _timm("eva_giant_patch14_224", mlp_ratio=2, dynamic_img_size=True), 1, False, {}, read_past=("qkv",)
    ),
}

if find_spec("transformers.models.granite_docling") is None:  # it came after the oldest version
    del TOWERS["granite-docling"]
# One of each kind; what repeats a test on the others is for the `zoo` lane.
KINDS = (
    "clip",
    "siglip",
    "vit",
    "dinov2",
    "dinov2-registers",
    "internvit",
    "siglip2-padded",
    "pixtral",
    "timm-vit",
    "timm-eva",
)
FURTHER = [tower for name, tower in TOWERS.items() if name not in KINDS]
REPLACEABLE = [name for name, tower in TOWERS.items() if tower.replaceable]

# The methods that change what a tower computes: one line each.
VISION: dict[str, Callable[[], vltok.Method | list[vltok.Method]]] = {
    "soft": lambda: vltok.SOFT(ratio=2),
    "soft-plain": lambda: vltok.SOFT(ratio=3, conv_size=1, normalize=False),
    "soft-range": lambda: vltok.SOFT(ratio=2, blocks=(1, -1), init="mean"),
    "tap": lambda: vltok.TAP(),
    "tap-range": lambda: vltok.TAP(num_scales=2, blocks=(-1, None), init="published"),
    "tap-adl": lambda: [vltok.TAP(num_scales=3), vltok.ADL()],
    "soft-tap": lambda: [vltok.SOFT(ratio=2), vltok.TAP()],
    "adl": lambda: vltok.ADL(threshold=1.2),
    "tome": lambda: vltok.ToMe(r=3),
    "tome-blocks": lambda: vltok.ToMe(r=(0, 5, 1)),
}


def draw(handle: vltok.Handle, seed: int = 1) -> vltok.Handle:
    """Draw the weights that methods brought into a model large, the same at every call."""
    for module in handle.added_modules:
        training = module.training
        tiny.sharpen(module, seed).train(training)
        for part in module.modules():
            if isinstance(part, SoftmaxFreeAttention):
                # At full size all tokens are so far apart that the kernel is 0, and the convolution all that is left.
                part.W_q.weight.data.mul_(0.35)
                part.attn.Qnorm_act[0].weight.data.mul_(0.5)
    return handle


@dataclass(frozen=True)
class VisionPair:
    """One or several methods on one tower."""

    tower: Tower
    methods: tuple[vltok.Method, ...]

    @property
    def brings_weights(self) -> bool:
        """Whether they bring weights."""
        return any(not isinstance(method, vltok.ADL | vltok.ToMe) for method in self.methods)

    @property
    def changes(self) -> bool:
        """Whether the model computes something else with them on."""
        return self.brings_weights or self.has(vltok.ToMe)

    def has(self, kind: type[vltok.Method]) -> bool:
        """Whether one of them is of this kind."""
        return any(isinstance(method, kind) for method in self.methods)

    def apply(self, model: nn.Module) -> vltok.Handle:
        """Apply them, with large weights where they bring some."""
        return draw(vltok.apply(model, self.methods))


def _methods(made: vltok.Method | list[vltok.Method]) -> tuple[vltok.Method, ...]:
    return tuple(made) if isinstance(made, list) else (made,)


EVERY: dict[str, VisionPair] = {
    f"{key}-{name}": VisionPair(tower, _methods(make()))
    for name, make in VISION.items()
    for key, tower in TOWERS.items()
}


def _fits(pair: VisionPair) -> bool:
    """Whether the tower takes the methods."""
    tower = pair.tower
    return (tower.replaceable or not pair.has(vltok.SOFT)) and (tower.mergeable or not pair.has(vltok.ToMe))


PAIRS = {name: pair for name, pair in EVERY.items() if _fits(pair)}
REFUSED = {name: pair for name, pair in EVERY.items() if name not in PAIRS}


@functools.lru_cache
def shared_tower(tower: Tower, attention: str = "sdpa") -> nn.Module:
    """A model that many tests share: they may attach to it but must leave it as they found it."""
    return tower.model(attention)


@functools.lru_cache
def pixels(batch: int = 3, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """Noise pictures, (B, 3, H, W)."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
