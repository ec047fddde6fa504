"""The one list of methods and families: every promise in tests/contract/ is checked for each pair."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch
import zoo
from towers import draw
from zoo import gemma, qwen

import vltok

# With tau=1 stage 2 drops wherever text attends to anything but visual tokens: its path is taken for certain.
PRUNING: dict[str, Callable[[], vltok.Method]] = {
    "todre": lambda: vltok.ToDRE(keep_ratio=0.3, tau=1.0, depth=0.5),
    "todre-stage-1": lambda: vltok.ToDRE(keep_ratio=0.3, relevance=False),
    "todre-stage-2": lambda: vltok.ToDRE(stages=(2,), tau=1.0, depth=(0.25, 0.75)),
    "todre-k-center": lambda: vltok.ToDRE(num_keep=3, strategy="k_center", pivot="farthest", relevance=False),
    "divprune": lambda: vltok.DivPrune(keep_ratio=0.3),
    "fastervlm": lambda: vltok.FasterVLM(keep_ratio=0.3),
    "random": lambda: vltok.RandomTokens(keep_ratio=0.3, seed=7),
    "stride": lambda: vltok.StrideTokens(num_keep=4),
}
# The reference set: on those of REFERENCED, the zoo for the most part; in the quick lane only those of SAMPLED.
REFERENCE: dict[str, Callable[[], vltok.Method]] = {
    "visionzip": lambda: vltok.VisionZip(num_keep=5, contextual=0.4),
    "prumerge_plus": lambda: vltok.PruMergePlus(keep_ratio=0.4),
    "scope": lambda: vltok.SCOPE(keep_ratio=0.3),
    "vispruner": lambda: vltok.VisPruner(keep_ratio=0.3),
    "holov": lambda: vltok.HoloV(keep_ratio=0.3),
    "cdpruner": lambda: vltok.CDPruner(keep_ratio=0.3),
    "mmtok": lambda: vltok.MMTok(keep_ratio=0.3),
    "dart": lambda: vltok.DART(num_keep=5),
    "otprune": lambda: vltok.OTPrune(keep_ratio=0.3),
    "divprune-merging": lambda: vltok.DivPrune(keep_ratio=0.3, merge="nearest", correction="centred"),
    "divprune-standardised": lambda: vltok.DivPrune(keep_ratio=0.3, merge="nearest", correction="standardised"),
    "todre-standardised": lambda: vltok.ToDRE(keep_ratio=0.3, relevance=False, correction="standardised"),
    "fastv": lambda: vltok.FastV(keep_ratio=0.3),
    "pyramid_drop": lambda: vltok.PyramidDrop(),
    "sparsevlm": lambda: vltok.SparseVLM(),
    "dart_decoder": lambda: vltok.DARTDecoder(num_keep=5),
}
# One that merges and reads the tower's attention, one that reads the question, one that drops inside the decoder.
SAMPLED = ("visionzip", "cdpruner", "fastv")
# These bring weights. Each gets the family, as not every setting fits every patch grid.
TRAINED: dict[str, Callable[[tiny.TinyFamily], vltok.Method]] = {
    "tokenpacker": lambda family: vltok.TokenPacker(scale_factor=family.packer_scale),
    "tokenpacker-scales": lambda family: vltok.TokenPacker(scale_factor=(family.packer_scale, 1)),
    "average_pool": lambda family: vltok.AveragePool(scale_factor=family.packer_scale),
    "pixel_shuffle": lambda family: vltok.PixelShuffle(scale_factor=family.packer_scale),
    "soft": lambda family: vltok.SOFT(ratio=2),
    "tap": lambda family: vltok.TAP(num_scales=3),
}
# Those among them that put another projector in the place of the model's own; these only where they can continue it.
CONDENSING = ("tokenpacker", "tokenpacker-scales")
CONTINUING = ("average_pool", "pixel_shuffle")
# These leave tokens out inside the vision tower.
MERGING: dict[str, Callable[[tiny.TinyFamily], vltok.Method]] = {"tome": lambda family: vltok.ToMe(r=3)}
# On decoders with windows: one selector, and one method that drops inside the decoder as well.
WINDOWED = ("todre", "stride")
# On further families: one selector; where much hangs on the decoder, DROPPING has one that drops inside it as well.
FURTHER_NAMES = ("stride",)

OWN = [*tiny.ALL, *tiny.WINDOWED]
# Families with rows of the reference set.
REFERENCED = [*tiny.ALL, qwen.QWEN3_VL, gemma.SMOLVLM, gemma.GEMMA3_ROW]
# Of these, those whose first decoder layers add features of the tower, so that rules may drop behind them alone.
DEEP = [qwen.QWEN3_VL]
FURTHER = [family for family in zoo.ROWS if family not in OWN]
FAMILIES: dict[str, tiny.TinyFamily] = {family.key: family for family in [*OWN, *FURTHER]}


@functools.lru_cache
def _writer(family: tiny.TinyFamily) -> torch.nn.Module:
    """A model for processors to be set up with, while the one under test may have the method on already."""
    return family.model()


@dataclass(frozen=True)
class Pair:
    """One method on one family.

    Attributes:
        family: The family.
        method: The method, or None.
        prunes: Whether it leaves out visual tokens that the projector has made.
        works: Whether the family has a place for it.
        is_reference: Whether the method is of the reference set.
        is_extra: Whether the quick lane leaves it to others of the reference set.
    """

    family: tiny.TinyFamily
    method: vltok.Method | None
    prunes: bool
    works: bool
    is_reference: bool = False
    is_extra: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """What stands before batch and length in the shape of this family's positions."""
        return (self.family.axes,) if self.family.axes > 1 else ()

    @property
    def reads_question(self) -> bool:
        """Whether another question may keep other tokens, so that a talk told anew may keep others than its turns."""
        return isinstance(self.method, vltok.DecoderRule | vltok.TextSelector)

    @property
    def needs_question(self) -> bool:
        """Whether there has to be a word that is no answer."""
        return isinstance(self.method, vltok.Selector) and "text" in self.method.needs

    def entering(self, length: int) -> int:
        """How many visual tokens of an image or video of so many enter the decoder."""
        return self.method.budget(length, None, "image") if isinstance(self.method, vltok.Selector) else length

    @property
    def unpruned(self) -> Pair:
        """The family without the method."""
        return replace(self, method=None, prunes=False)

    @property
    def tower_refuses_maps(self) -> bool:
        """Whether the tower, which this family asks for maps along with the decoder, has none under this method."""
        return self.family.tower_shows_maps and isinstance(self.method, vltok.SOFT)

    def apply(self, model: torch.nn.Module, processor: Any = None) -> Any:
        """Apply the method; weights it brings are drawn large, the same at every call; no test's generator moves."""
        if self.method is None:
            return nullcontext()
        with torch.random.fork_rng(devices=[]):
            return draw(vltok.apply(model, self.method, processor=processor or self.family.processor()))

    def inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Process prompts as the processor does while the method is on."""
        if self.method is None:
            return self.family.inputs(*args, **kwargs)
        processor = self.family.processor()
        with torch.random.fork_rng(devices=[]), vltok.apply(_writer(self.family), self.method, processor=processor):
            return self.family.inputs(*args, **kwargs, processor=processor)


def _works(family: tiny.TinyFamily, method: vltok.Method) -> bool:
    """Whether a pruning method can ask the family for what it ranks tokens by."""
    if family.shows_patches or not isinstance(method, vltok.Selector):
        return True
    return method.attention_request(family.has_cls) is None and "features" not in method.needs


def _dropping(family: tiny.TinyFamily) -> vltok.Method:
    return vltok.ToDRE(keep_ratio=0.3, tau=1.0, depth=family.drop_depth, pivot="center")


def _late(method: vltok.Method) -> vltok.Method:
    """The same, with all that it drops in several places of the decoder in the second half."""
    depths = getattr(method, "depths", None)
    return method if depths is None else replace(method, depths=tuple(0.5 + depth / 2 for depth in depths))


def _projectors(family: tiny.TinyFamily) -> tuple[str, ...]:
    """The methods whose projector has a place in the family."""
    return (*CONDENSING, *(CONTINUING if family.continued else ())) if family.projects else ()


def _pairs() -> dict[str, Pair]:
    pairs = {}
    for key, family in FAMILIES.items():
        names = PRUNING if family in tiny.ALL else WINDOWED if family in tiny.WINDOWED else FURTHER_NAMES
        methods = {name: PRUNING[name]() for name in names}
        pairs |= {f"{key}-{name}": Pair(family, each, True, _works(family, each)) for name, each in methods.items()}
        if family in REFERENCED:
            methods = {name: _late(make()) if family in DEEP else make() for name, make in REFERENCE.items()}
            pairs |= {
                f"{key}-{name}": Pair(family, each, True, _works(family, each), True, name not in SAMPLED)
                for name, each in methods.items()
            }
        if family in tiny.ALL:
            trained = (*family.tower, *_projectors(family))
            others = TRAINED | MERGING
            pairs |= {f"{key}-{name}": Pair(family, others[name](family), False, name in trained) for name in others}
        elif family in FURTHER and family.projects:
            pairs[f"{key}-tokenpacker"] = Pair(family, TRAINED["tokenpacker"](family), False, True)
    return pairs


EVERY: dict[str, Pair] = _pairs()
PAIRS = {name: pair for name, pair in EVERY.items() if pair.works}
REFUSED = {name: pair for name, pair in EVERY.items() if not pair.works}
SELECTING = {name: pair for name, pair in PAIRS.items() if pair.prunes}
DROPPING = {f"{family.key}-todre": Pair(family, _dropping(family), True, True) for family in FURTHER}
BRINGING_WEIGHTS = {name: pair for name, pair in PAIRS.items() if not pair.method.training_free}
WEIGHTLESS = {name: pair for name, pair in PAIRS.items() if pair.method.training_free}


def one_of_each(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """Of these pairs a few in which every family and every method comes up."""
    families, methods, chosen = set(), set(), {}
    for name, pair in pairs.items():
        if pair.family not in families or repr(pair.method) not in methods:
            families.add(pair.family)
            methods.add(repr(pair.method))
            chosen[name] = pair
    return chosen


def parameters(pairs: dict[str, Pair]) -> list[Any]:
    """The pairs as parameters of a test."""
    return [pytest.param(pair, id=name, marks=_marks(pair)) for name, pair in pairs.items()]


def _marks(pair: Pair) -> list[Any]:
    if pair.is_reference and pair.family is not tiny.ALL[0]:
        return [pytest.mark.full, pytest.mark.zoo]
    return [pytest.mark.full] if pair.family in FURTHER or pair.is_extra else []
