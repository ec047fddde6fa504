"""Condenser, the base of the methods that put a projector with fewer visual tokens in the place of the model's own.

A projector that serves several scale factors is a Matryoshka model: https://arxiv.org/abs/2405.17430 (M3, Cai et al.,
2024) averages patches at several scales, https://arxiv.org/abs/2405.19315 (MQT, Hu et al., 2024) draws how many tokens
there are at each training step, as is done here. None of it is meant to be training-free, but all of it can start from
average pooling before the model's own projector. Differs from both papers in what makes the tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from vltok.checks import check_integer
from vltok.edits import Edits
from vltok.errors import UnsupportedModelError
from vltok.method import Method, Run
from vltok.methods.condensing.regions import RegionProjector, check_scales
from vltok.views import ProjectorSite, ProjectorView


@dataclass(frozen=True)
class Condenser(Method):
    """Base of methods that condense visual tokens in a new projector: s^2 times fewer. Not training-free.

    Attributes:
        scale_factor: Side s of a region of patches that becomes one token; must divide the model's patch grid. Several
            make a projector that serves each of them: the first counts, in `handle.using(scale_factor=...)` the one
            that is given.
    """

    training_free: ClassVar[bool] = False

    scale_factor: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        if isinstance(self.scale_factor, list):
            object.__setattr__(self, "scale_factor", tuple(self.scale_factor))
        check_scales(self.scale_factor)

    @property
    def scales(self) -> tuple[int, ...]:
        """All scale factors, the one that counts first."""
        return self.scale_factor if isinstance(self.scale_factor, tuple) else (self.scale_factor,)

    def per_call(self) -> tuple[str, ...]:
        return ("scale_factor",) if len(self.scales) > 1 else ()

    def with_settings(self, scale_factor: int) -> Condenser:
        check_integer("scale_factor", scale_factor)
        if scale_factor not in self.scales:
            raise ValueError(f"scale_factor must be one of {sorted(self.scales)} in a block, got {scale_factor}")
        others = (scale for scale in self.scales if scale != scale_factor)
        return replace(self, scale_factor=(scale_factor, *others))

    def attach(self, view: ProjectorView, edits: Edits, run: Run) -> None:
        site = view.projector_site()
        if isinstance(site.old, RegionProjector):
            raise ValueError(
                f"this model's visual tokens are already condensed by a {type(site.old).__name__}; remove that handle "
                "first"
            )
        projector, levels = self.projector(site)
        parameter = next(p for p in site.old.parameters() if p.is_floating_point())
        projector.to(parameter.device, parameter.dtype)
        view.swap_projector(edits, run, projector, levels, Scales(run, self))

    def projector(self, site: ProjectorSite) -> tuple[RegionProjector, tuple[int, ...]]:
        """Make the projector for a place, and say which hidden states of the tower it reads.

        Raises:
            UnsupportedModelError: If it can't continue the model's own projector.
            ValueError: If a setting doesn't fit the model.
        """
        raise NotImplementedError(f"{type(self).__name__} must define projector()")


@dataclass(frozen=True)
class Scales:
    """The scale factors of a method on a model.

    Attributes:
        run: Of the handle.
        method: The method, as the handle has it.
    """

    run: Run
    method: Condenser

    @property
    def every(self) -> tuple[int, ...]:
        return self.method.scales

    @property
    def now(self) -> int:
        return self.run.current(self.method).scales[0]

    def at(self, scale_factor: int) -> AbstractContextManager[None]:
        return self.run.using([(self.method, self.method.with_settings(scale_factor=scale_factor))])


def two_layers(site: ProjectorSite) -> tuple[nn.Linear, nn.Linear]:
    """The linear layers of the model's own projector, with a GELU between, which read the patches one by one.

    Raises:
        UnsupportedModelError: If it is built otherwise.
    """
    if site.layers is None:
        raise UnsupportedModelError(
            "this method continues a projector of two linear layers with a GELU between; "
            f'{type(site.old).__name__} is built otherwise; use TokenPacker with init="random"'
        )
    return site.layers
