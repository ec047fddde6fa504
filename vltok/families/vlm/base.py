"""VlmFamily, the base of the vision-language families: where the parts of such a model are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from vltok.edits import Edits
from vltok.engine.attention import rows_of_tower
from vltok.engine.features import Encoding, Picture, pixel_keys
from vltok.engine.parts import attention_of, live
from vltok.engine.projector import CoarserPatches, swap_projector
from vltok.errors import UnsupportedModelError
from vltok.method import Run
from vltok.views import AttentionKind, AttentionRequest, ProjectorSite


class VlmFamily:
    """A family is stateless: everything it knows it reads from the model it is given."""

    name: ClassVar[str]
    title: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    unit: ClassVar[str] = "entry"  # of the features: what a picture is made of, see `engine.features.find_pictures`
    multi_axis_positions: ClassVar[bool] = False
    attention_parts: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj")  # what attention in the tower is read from
    patch_counters: ClassVar[tuple[str, ...]] = ()  # methods of the model that count a picture's patches by its config

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return live(model.vision_tower)

    def has_cls(self, model: nn.Module) -> bool:
        """Whether the vision tower has a [CLS] token."""
        names = (name.rpartition(".")[2] for name, _ in self.tower(model).named_parameters())
        return any(name in ("class_embedding", "cls_token") for name in names)

    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError if this member of the family can't be handled."""

    def check_pruning(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError if the visual tokens of this member can't be pruned."""

    def decoder(self, model: nn.Module) -> nn.Module:
        """The decoder that visual tokens enter, with its `layers`."""
        return model.language_model

    def marks(self, model: nn.Module) -> list[int]:
        """The ids that stand for visual tokens in prompts."""
        return [model.config.image_token_id]

    def pixel_keys(self, model: nn.Module, encoding: Encoding, pixels: torch.Tensor) -> torch.Tensor:
        """A number from the pixels of each entry of the features, (entries,), int64."""
        return pixel_keys(pixels)

    def read_attention(
        self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], kind: AttentionKind
    ) -> torch.Tensor:
        """Read attention in the tower as its attention module is about to run; by rows, as `rows_of_tower` gives it."""
        return rows_of_tower(attention, args, kwargs, kind)

    def token_attention(self, model: nn.Module, encoding: Encoding) -> torch.Tensor | None:
        """The attention that was read, for each visual token of the encoding, (V,), float32.

        -inf where a token stands for no patch, such as the newline tokens of AnyRes layouts.
        """
        raise NotImplementedError

    def overview(self, model: nn.Module, encoding: Encoding, picture: Picture) -> torch.Tensor | None:
        """Which tokens of a picture show the whole of it, (N,), bool; None if all do."""
        return None

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
        attention = attention_of(layers[request.layer])
        if missing := [name for name in self.attention_parts if not hasattr(attention, name)]:
            raise UnsupportedModelError(
                f"{type(attention or layers[request.layer]).__name__} has no {' and '.join(missing)} to read attention "
                "from; CLIP, SigLIP and InternVL vision towers have; choose a method that needs no vision attention, "
                "such as pivot='center'"
            )
        return attention

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

    def patch_size(self, model: nn.Module) -> int:
        """Side of a patch in pixels."""
        size = self.tower(model).config.patch_size
        return size if isinstance(size, int) else size[0]

    def patch_attention(self, model: nn.Module, encoding: Encoding) -> torch.Tensor | None:
        """The attention that was read, without the prefix tokens, (R, patches)."""
        if encoding.attention is None:
            return None
        side = self.patch_size(model)
        patches = (encoding.pixels_shape[-2] // side) * (encoding.pixels_shape[-1] // side)
        return encoding.attention[:, -patches:]
