"""What vltok does on which models, told by the families themselves: as objects, and as one table for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

LEGEND = (
    "An image is an entry of what get_image_features() returns; a run of placeholders, made of whole entries such as "
    "tiles; or such a run, where all images of a row are encoded together. Attention: whether selectors may rank "
    "visual tokens by attention in the vision tower. Windows: tested on decoders with layers that see only the last "
    "tokens."
)
_TAKES = {"no": "images", "yes": "images, videos", "frames": "images, videos as images"}


@dataclass(frozen=True)
class ModelSupport:
    """What vltok does on the models of a vision-language family.

    Attributes:
        name: The family's name, which saved files use.
        title: What people call its models.
        model_types: What their configs call them in transformers.
        model_classes: Names of their classes, without the head.
        videos: Whether they take videos: "no"; "yes"; or "frames", each of which is an image to the model.
        cls: Whether the vision tower has a [CLS] token whose attention selectors may read: "yes", "no", or with which
            towers.
        attention: Whether selectors may rank visual tokens by attention in the vision tower.
        positions: What selectors may do with positions.
        windows: Whether it is tested on decoders some layers of which see only the last tokens.
        unit: What an image is: an "entry" of the features, a "run" of placeholders, or a run in a "row".
        condensers: Methods that put another projector in the place of the model's own.
        real_processor: Whether it is tested with its real processor, or with inputs that are made up.
        refuses: Members of the family that are refused, "" for none.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    model_classes: tuple[str, ...]
    videos: Literal["no", "yes", "frames"]
    cls: str
    attention: bool
    positions: tuple[str, ...]
    windows: bool
    unit: Literal["entry", "run", "row"]
    condensers: tuple[str, ...]
    real_processor: bool
    refuses: str

    @classmethod
    def of(cls, family: Any) -> ModelSupport:
        """Ask a `VlmFamily`."""
        return cls(
            name=family.name,
            title=family.title,
            model_types=(family.name, *family.also),
            model_classes=family.model_classes,
            videos=family.videos,
            cls=family.cls,
            attention=family.reads_attention,
            positions=("keep",) if family.axes else ("keep", "reindex", "stretch"),
            windows=family.windows,
            unit=family.unit,
            condensers=family.condensers,
            real_processor=family.real_processor,
            refuses=family.refuses,
        )

    def cells(self) -> dict[str, str]:
        """Its row of the table."""
        return {
            "Family": self.title,
            "Model type": ", ".join(self.model_types),
            "Takes": _TAKES[self.videos],
            "[CLS]": self.cls,
            "Attention": "yes" if self.attention else "no",
            "Positions": ", ".join(self.positions),
            "Windows": "yes" if self.windows else "no",
            "An image is": self.unit,
            "Condensers": ", ".join(self.condensers) or "none",
            "Tested with": "its processor" if self.real_processor else "synthetic inputs",
        }


@dataclass(frozen=True)
class TowerSupport:
    """What vltok does on the models of a family of vision towers, alone or in a vision-language model.

    Attributes:
        name: The family's name, which saved files use.
        title: What people call its models.
        model_classes: Names of their classes.
        methods: Which methods that change a tower fit.
        refuses: Members of the family that are refused, "" for none.
    """

    name: str
    title: str
    model_classes: tuple[str, ...]
    methods: tuple[str, ...]
    refuses: str

    @classmethod
    def of(cls, family: Any) -> TowerSupport:
        """Ask a `TowerFamily`."""
        return cls(family.name, family.title or family.name, family.model_classes, family.methods, family.refuses)

    def cells(self) -> dict[str, str]:
        """Its row of the table."""
        fits = {method: "yes" if method in self.methods else "no" for method in ("SOFT", "TAP", "ADL")}
        return {"Vision tower": self.title, "Name": self.name, "Classes": ", ".join(self.model_classes), **fits}
