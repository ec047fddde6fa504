"""Attention in the vision towers of all families, against the towers' own eager softmax.

Which patches a token stands for is asked of the model: with attention off, nothing else passes from patch to patch, so
a token has gradients in its own patches alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from prompts import probe
from tiny import TinyFamily, clip, picture
from torch import nn
from zoo import gemma, glm, late, qwen, tiles

import vltok
from vltok.errors import UnsupportedModelError
from vltok.families import view

EVERY = {row.key: row for part in (gemma, glm, qwen, tiles, late) for row in part.ROWS} | {
    row.key: row for row in tiny.ALL
}
READ = {key: row for key, row in EVERY.items() if row.shows_patches}
REFUSED = {key: row for key, row in EVERY.items() if not row.shows_patches}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@functools.lru_cache(maxsize=4)
def model_of(key: str, attention: str = "sdpa") -> nn.Module:
    return EVERY[key].model(attention)


def inputs_of(family: TinyFamily, kind: str) -> Any:
    """One prompt with one image of either size, or one video."""
    if kind == "video":
        return family.inputs(["w1 <video> w2"], videos=[clip(3, family.size, family.frames)])
    return family.inputs(["w1 <image> w2"], [picture(3, family.size if kind == "image" else family.other_size)])


# The twin


@dataclass
class Seen:
    """What an unpruned model did: softmax maps of a layer, what entered its tower, and the entries of its features."""

    maps: list[torch.Tensor] = field(default_factory=list)
    entered: list[torch.Tensor] = field(default_factory=list)
    entries: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def hooked(module: nn.Module, before: Callable | None = None, after: Callable | None = None) -> Iterator[None]:
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True)] if before else []
    hooks += [module.register_forward_hook(after)] if after else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(model: nn.Module) -> list[nn.ModuleList]:
    """The blocks of each vision tower, of the modules that vltok hooks."""
    family = view(model).family
    return [max((m for m in t.modules() if isinstance(m, nn.ModuleList)), key=len) for t in family.towers(model.model)]


def attention_in(block: nn.Module) -> nn.Module:
    return next(child for name, child in block.named_children() if name in ("self_attn", "attn", "attention"))


def run(model: nn.Module, inputs: Any) -> Seen:
    """Run a model, and keep the entries of its features."""
    seen = Seen()
    plain = {
        name: getattr(model.model, name)
        for name in ("get_image_features", "get_video_features")
        if hasattr(model.model, name)
    }

    def keep(name: str, *args: Any, **kwargs: Any) -> Any:
        output = plain[name](*args, **kwargs)
        seen.entries = [entry.flatten(0, -2) for entry in output.pooler_output]
        return output

    try:
        for name in plain:
            setattr(model.model, name, functools.partial(keep, name))
        model(**inputs)
    finally:
        for name in plain:
            delattr(model.model, name)
    return seen


def softmax_of(model: nn.Module, inputs: Any, layer: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The maps that the attention of a layer makes, (B, H, S, S) each, all windows one after another."""
    maps, inside = [], []

    def recorded(plain: Callable) -> Callable:
        def softmax(*args: Any, **kwargs: Any) -> torch.Tensor:
            watched = inside and inside.pop()  # once, as one calls the other
            out = plain(*args, **kwargs)
            if watched:
                maps.append(out.float())
                inside.append(True)
            return out

        return softmax

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "softmax", recorded(nn.functional.softmax))
        patch.setattr(torch.Tensor, "softmax", recorded(torch.Tensor.softmax))
        for blocks in blocks_of(model):
            attention = attention_in(blocks[layer])
            vars(attention).update({"fused_attn": False} if hasattr(attention, "fused_attn") else {})
            attention.register_forward_pre_hook(lambda *_: inside.append(True))
            attention.register_forward_hook(lambda *_: inside.clear())
        model(**inputs)
    for blocks in blocks_of(model):
        attention_in(blocks[layer])._forward_pre_hooks.clear()
        attention_in(blocks[layer])._forward_hooks.clear()
    return maps


def received(weights: torch.Tensor) -> torch.Tensor:
    """Column sums of a map, (B, H, S, S) -> (B, S), without the queries of tokens that nobody looks at: padding."""
    mean = weights.mean(1)
    real = mean.amax(1) > 0
    out = torch.zeros(mean.shape[::2])
    for row in range(len(mean)):
        for query in range(mean.shape[1]):
            out[row] += mean[row, query] * real[row, query]
    return out


def behind(model: nn.Module, inputs: Any, layer: int, has_cls: bool) -> torch.Tensor:
    """Which of the patches in a layer of the tower each visual token stands for, (V, R * S), bool."""
    entered: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    def off(module: nn.Module, args: tuple, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    hooks = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True) for blocks in blocks_of(model)]
    hooks += [blocks[layer].register_forward_pre_hook(note, with_kwargs=True) for blocks in blocks_of(model)]
    hooks += [attention_in(b).register_forward_hook(off) for blocks in blocks_of(model) for b in blocks]
    try:
        with torch.enable_grad():
            tokens = torch.cat(run(model, inputs).entries)
            (states,) = entered
            mix = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(0))
            grads = [
                torch.autograd.grad((t * mix).sum(), states, retain_graph=True, allow_unused=True)[0] for t in tokens
            ]
    finally:
        for hook in hooks:
            hook.remove()
    patches = torch.ones(states.shape[:-1], dtype=torch.bool)
    if has_cls:
        patches[:, 0] = False
    found = [torch.zeros_like(patches) if grad is None else grad.abs().sum(-1) > 0 for grad in grads]
    return torch.stack([(own & patches).flatten() for own in found])


def expected(key: str, inputs: Any, kind: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Mean over the patches of each token of what the softmax of the tower says, (V,)."""
    model = model_of(key, "eager")
    maps = softmax_of(model, inputs, layer, monkeypatch)
    rows = [each.mean(1)[:, 0] if kind == "cls" else received(each) for each in maps]
    values = torch.cat(rows, dim=-1).flatten()
    owned = behind(model, inputs, layer, READ[key].has_cls)
    return torch.stack([values[own].mean() if own.any() else torch.tensor(-torch.inf) for own in owned])


def kinds(family: TinyFamily) -> list[str]:
    return ["image", "other image", *(["video"] if family.video else [])]


CASES = [pytest.param(key, kind, id=f"{key}-{kind}") for key, family in READ.items() for kind in kinds(family)]


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(("key", "kind"), CASES)
def test_attention_received_is_the_mean_over_the_patches_of_a_token(key, kind, layer, monkeypatch):
    inputs = inputs_of(READ[key], kind)
    seen = probe(model_of(key), inputs, "received", layer)
    actual = torch.cat([visual.attention.flatten() for visual in seen])
    torch.testing.assert_close(actual, expected(key, inputs, "received", layer, monkeypatch), **CLOSE)
