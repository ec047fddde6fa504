"""VlmFamily, the base of the vision-language families: where the parts of such a model are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from vltok.edits import Edits
from vltok.engine.features import Encoding, ImageTokens, VisionRecorder
from vltok.engine.projector import CoarserPatches, swap_projector
from vltok.errors import UnsupportedModelError
from vltok.method import Run
from vltok.views import AttentionRequest, ProjectorSite


class VlmFamily:
    """A family is stateless: everything it knows it reads from the model it is given."""

    name: ClassVar[str]
    title: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    multi_axis_positions: ClassVar[bool] = False
    patch_counters: ClassVar[tuple[str, ...]] = ()  # methods of the model that count a picture's patches by its config

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return model.vision_tower

    def has_cls(self, model: nn.Module) -> bool:
        """Whether the vision tower has a [CLS] token."""
        names = (name.rpartition(".")[2] for name, _ in self.tower(model).named_parameters())
        return any(name in ("class_embedding", "cls_token") for name in names)

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError if this member of the family can't be handled."""

    def check_pruning(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError if the visual tokens of this member can't be pruned."""
        config = model.language_model.config
        types = getattr(config, "layer_types", None)
        sliding = any("full" not in kind for kind in types) if types else getattr(config, "sliding_window", None)
        if sliding:
            raise UnsupportedModelError(
                f"{type(model.language_model).__name__} uses sliding-window or chunked attention, whose windows would "
                "shift when visual tokens leave; load the model with full attention (sliding_window=None)"
            )

    def watch_vision(self, edits: Edits, model: nn.Module, recorder: VisionRecorder) -> None:
        """Let `recorder` see every image that is encoded."""
        recorder.watch(edits, self.tower(model), model.multi_modal_projector)

    def watch_attention(
        self, edits: Edits, model: nn.Module, recorder: VisionRecorder, request: AttentionRequest
    ) -> None:
        """Let `recorder` read the requested attention."""
        recorder.watch_attention(edits, self.attention_module(model, request), request)

    def attention_module(self, model: nn.Module, request: AttentionRequest) -> nn.Module:
        """Find the attention module of a tower layer by its index.

        Raises:
            UnsupportedModelError: If the tower has no [CLS] token to ask for.
            ValueError: If there is no such layer.
        """
        tower = self.tower(model)
        if request.kind == "cls" and not self.has_cls(model):
            raise UnsupportedModelError(
                f"{type(tower).__name__} has no [CLS] token; use a method or pivot that needs none "
                "(for ToDRE pivot='center', 'farthest' or 'random'), or a model with a CLIP or InternViT tower"
            )
        layers = max((m for m in tower.modules() if isinstance(m, nn.ModuleList)), key=len)
        if not -len(layers) <= request.layer < len(layers):
            raise ValueError(f"the vision tower has {len(layers)} layers; there is no layer {request.layer}")
        layer = layers[request.layer]
        for name in ("self_attn", "attention", "attn"):
            if hasattr(layer, name):
                return getattr(layer, name)
        raise UnsupportedModelError(f"{type(layer).__name__} has no attention module that vltok knows")

    def projector_site(self, model: nn.Module) -> ProjectorSite:
        """Say where the projector stands.

        Raises:
            UnsupportedModelError: If this family's projector can't be replaced, or not in this member.
        """
        raise UnsupportedModelError(
            f"the projector of {self.title} merges patches itself and its processor counts on that, so it can't be "
            "replaced; families that can: llava (LLaVA-1.5 and its kin), llava_next, llava_onevision"
        )

    def processor_fields(self, model: nn.Module, scale_factor: int) -> dict[str, tuple[Any, Any]]:
        """What the processor counts placeholders by: for each field its value now, and for s^2 times fewer."""
        size = model.config.vision_config.patch_size
        return {"patch_size": (size, size * scale_factor)}

    def swap_projector(
        self,
        edits: Edits,
        run: Run,
        model: nn.Module,
        processor: Any,
        projector: nn.Module,
        levels: tuple[int, ...],
        scale_factor: int,
    ) -> dict[str, dict[str, Any]]:
        """Replace the projector, see `ProjectorView.swap_projector`. Returns what config and processor held before."""
        fields = self.processor_fields(model, scale_factor)
        before = swap_projector(edits, run, model, processor, fields, projector, levels, scale_factor)
        for name in self.patch_counters:
            edits.set_attribute(model, name, CoarserPatches(model, name, scale_factor))
        return before

    def image_token_id(self, model: nn.Module) -> int:
        """The id of the placeholder."""
        return model.config.image_token_id

    def images(self, model: nn.Module, encoding: Encoding, runs: list[int]) -> list[ImageTokens]:
        """Say how the encoded rows became images.

        Args:
            model: The model.
            encoding: What the vision tower encoded last.
            runs: Lengths of the unbroken runs of placeholders in the prompts, in order.
        """
        raise NotImplementedError

    def patch_size(self, model: nn.Module) -> int:
        """Side of a patch in pixels."""
        size = self.tower(model).config.patch_size
        return size if isinstance(size, int) else size[0]

    def patch_attention(self, model: nn.Module, encoding: Encoding) -> torch.Tensor | None:
        """The recorded attention without the prefix tokens, (R, patches)."""
        if encoding.attention is None:
            return None
        side = self.patch_size(model)
        patches = (encoding.pixels_shape[-2] // side) * (encoding.pixels_shape[-1] // side)
        return encoding.attention[:, -patches:]
