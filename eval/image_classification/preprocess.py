"""How pictures become a model's input: timm's transforms, sized to the model, to uint8; batches are scaled later."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from eval.image_classification.sources import Source

Transform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class Preprocess:
    """What a model expects.

    Attributes:
        input_size: Channels (1 or 3), height, width.
        mean: Subtracted from each channel, on the scale 0..1.
        std: What each channel is then divided by.
        interpolation: Of resizing, as timm names it.
        crop_pct: Share of a test picture's side that is left after the centre is cut out.
        crop_mode: How that is done, as timm names it.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @property
    def mode(self) -> str:
        """What a picture is converted to first, as Pillow names it."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def test_transform(self) -> Transform:
        """timm's transform for evaluation, to uint8 (C, H, W)."""
        return self._create(crop_pct=self.crop_pct, crop_mode=self.crop_mode)

    def whole_transform(self) -> Transform:
        """The same without cutting off a border that fits: what batches are augmented from."""
        return self._create(crop_pct=1.0)

    def train_transform(self, settings: Mapping[str, Any]) -> Transform:
        """timm's random transform for training with settings of `timm.data.create_transform`.

        Raises:
            ValueError: If timm knows no such setting.
        """
        try:
            return self._create(is_training=True, **settings)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"timm.data.create_transform refuses {dict(settings)}: {error}") from error

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Scale uint8 pictures (B, C, H, W) to what the model expects, float32."""
        mean, std = (torch.tensor(x, device=images.device).view(1, -1, 1, 1) for x in (self.mean, self.std))
        return (images.float() - 255 * mean).div_(255 * std)

    def _create(self, **settings: Any) -> Transform:
        fixed = {"input_size": self.input_size, "mean": self.mean, "std": self.std, "normalize": False}
        return create_transform(**{"interpolation": self.interpolation} | settings | fixed)


def for_model(
    model: nn.Module,
    test: Source,
    *,
    in_chans: int | None = None,
    side: int | None = None,
    crop_pct: float | None = None,
) -> Preprocess:
    """Read from a timm model how its pictures are prepared.

    Args:
        model: The model.
        test: Test pictures.
        in_chans: Channels it was made for, if it was told so.
        side: Height and width of its input, if the model is not to decide.
        crop_pct: In the place of the model's own, which is for photos. By default 1 where no test picture is larger
            than the input: nothing needs to be cut off them.

    Raises:
        ValueError: If the model takes neither 1 nor 3 channels.
    """
    config = resolve_model_data_config(model)
    channels = in_chans or config["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, the model takes {channels}")
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)  # what img_size=... changed, if it did
    height, width = (side, side) if side else (own or config["input_size"][1:])
    mean, std = ((sum(x) / len(x),) if channels < len(x) else tuple(x) for x in (config["mean"], config["std"]))
    if crop_pct is None:
        crop_pct = 1.0 if test.fits(height, width) else config["crop_pct"]
    return Preprocess((channels, height, width), mean, std, config["interpolation"], crop_pct, config["crop_mode"])
