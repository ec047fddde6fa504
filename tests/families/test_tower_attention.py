"""Attention in the vision towers of all families, against the towers' own eager softmax.

Which patches a token stands for is asked of the model: with attention off, nothing else passes from patch to patch, so
a token has gradients in its own patches alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from prompts import probe
from tiny import TinyFamily, clip, picture
from torch import nn
from unchanged import unchanged
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


def blocks_of(model: nn.Module) -> list[nn.ModuleList]:
    """The blocks of each vision tower, of the modules that vltok hooks."""
    family = view(model).family
    return [max((m for m in t.modules() if isinstance(m, nn.ModuleList)), key=len) for t in family.towers(model.model)]


def attention_in(block: nn.Module) -> nn.Module:
    return next(child for name, child in block.named_children() if name in ("self_attn", "attn", "attention"))


def features_of(model: nn.Module, inputs: Any) -> torch.Tensor:
    """The visual tokens of a call, (V, D)."""
    names = [name for name in ("get_image_features", "get_video_features") if hasattr(model.model, name)]
    plain, found = {name: getattr(model.model, name) for name in names}, []

    def keep(name: str, *args: Any, **kwargs: Any) -> Any:
        output = plain[name](*args, **kwargs)
        found[:] = [entry.flatten(0, -2) for entry in output.pooler_output]
        return output

    try:
        for name in names:
            setattr(model.model, name, functools.partial(keep, name))
        model(**inputs)
    finally:
        for name in names:
            delattr(model.model, name)
    return torch.cat(found)


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
            tokens = features_of(model, inputs)
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


def seen_by_selector(model: nn.Module, inputs: Any, kind: str, layer: int = -1) -> torch.Tensor:
    """The attention of all visual tokens of a prompt with one image or video, (V,)."""
    return torch.cat([visual.attention.flatten() for visual in probe(model, inputs, kind, layer)])


SHRUNK = (tiny.LLAVA_ONEVISION.key, "other image")  # its tokens are interpolated, so they have no mean
CASES = [
    pytest.param(key, kind, id=f"{key}-{kind}")
    for key, family in READ.items()
    for kind in kinds(family)
    if (key, kind) != SHRUNK
]


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(("key", "kind"), CASES)
def test_attention_received_is_the_mean_over_the_patches_of_a_token(key, kind, layer, monkeypatch):
    inputs = inputs_of(READ[key], kind)
    actual = seen_by_selector(model_of(key), inputs, "received", layer)
    torch.testing.assert_close(actual, expected(key, inputs, "received", layer, monkeypatch), **CLOSE)


@pytest.mark.parametrize(("key", "kind"), [case for case in CASES if READ[case.values[0]].has_cls])
def test_attention_of_the_cls_token_is_the_mean_over_the_patches_of_a_token(key, kind, monkeypatch):
    inputs = inputs_of(READ[key], kind)
    actual = seen_by_selector(model_of(key), inputs, "cls")
    torch.testing.assert_close(actual, expected(key, inputs, "cls", -1, monkeypatch), **CLOSE)


def test_attention_is_interpolated_as_the_tokens_are(monkeypatch):
    """What the tokens of a shrunk picture take of each token of the projector is asked of the model, too."""
    key, kind = SHRUNK
    inputs, eager = inputs_of(READ[key], kind), model_of(key, "eager")
    (weights,) = softmax_of(eager, inputs, -1, monkeypatch)
    projected = []

    def note(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        projected.append(output.detach().requires_grad_())
        return projected[-1]

    hook = eager.model.multi_modal_projector.register_forward_hook(note)
    with torch.enable_grad():
        tokens = features_of(eager, inputs)
        shares = torch.stack(
            [torch.autograd.grad(token[0], projected[0], retain_graph=True)[0][..., 0].flatten() for token in tokens]
        )
    hook.remove()
    has_patches = shares.sum(1) > 0
    actual = seen_by_selector(model_of(key), inputs, "received")
    assert ((shares > 0).sum(1) > 1).any() and not has_patches.all()
    assert torch.equal(actual.isfinite(), has_patches)
    torch.testing.assert_close(actual[has_patches], (shares @ received(weights).flatten())[has_patches], **CLOSE)


def test_tokens_that_the_model_itself_leaves_out_of_a_video_are_left_out_of_the_attention(monkeypatch):
    family = qwen.VIDEO_LLAMA_3
    inputs = family.inputs(["w1 <video> w2"], videos=[clip(3, family.size, 1).repeat(family.frames, 1, 1, 1)])
    kept = inputs["video_compression_mask"]
    assert not kept.all()
    actual = seen_by_selector(model_of(family.key), inputs, "received")
    torch.testing.assert_close(actual, expected(family.key, inputs, "received", -1, monkeypatch)[kept], **CLOSE)


# Batches

METHODS = [vltok.FasterVLM(keep_ratio=0.4), vltok.ToDRE(keep_ratio=0.4, pivot="auto", relevance=False)]
SEEDS_AND_SIZES = [(1, 0), (2, 1), (3, 1), (4, 0)]


def batch_and_singles(family: TinyFamily) -> tuple[Any, list[Any]]:
    """Prompts with one image each, of two sizes, in a batch and alone."""
    images = [picture(seed, (family.size, family.other_size)[size]) for seed, size in SEEDS_AND_SIZES]
    prompts = [f"w{number} <image> w9" for number in range(len(images))]
    singles = [family.inputs([prompt], [image]) for prompt, image in zip(prompts, images, strict=True)]
    return family.inputs(prompts, images), singles


@pytest.mark.parametrize("key", READ)
def test_attention_in_a_batch_of_images_of_different_sizes_is_that_of_each_alone(key):
    model, (together, singles) = model_of(key), batch_and_singles(READ[key])
    found: dict[int, torch.Tensor] = {}
    for visual in probe(model, together, "received"):
        found |= dict(zip(visual.image_keys.tolist(), visual.attention, strict=True))
    count = 0
    for inputs in singles:
        for visual in probe(model, inputs, "received"):
            for number, attention in zip(visual.image_keys.tolist(), visual.attention, strict=True):
                torch.testing.assert_close(found[number], attention, **CLOSE)
                count += 1
    assert count == len(found)


@pytest.mark.parametrize("method", METHODS, ids=["fastervlm", "todre"])
@pytest.mark.parametrize("key", READ)
def test_picks_do_not_depend_on_the_batch(key, method):
    model, (together, singles) = model_of(key), batch_and_singles(READ[key])
    with vltok.apply(model, method) as handle:
        model(**together)
        kept = handle.report(file=None).keep_indices
        for row, inputs in zip(kept, singles, strict=True):
            model(**inputs)
            (alone,) = handle.report(file=None).keep_indices
            assert [own.tolist() for own in row] == [own.tolist() for own in alone]


# Refusals


@pytest.mark.parametrize("key", REFUSED)
def test_families_whose_tokens_stand_for_no_patch_refuse_by_name(key):
    model = model_of(key)
    title = view(model).family.title
    with unchanged(model), pytest.raises(UnsupportedModelError, match=f"the visual tokens of {title} stand for"):
        vltok.apply(model, METHODS[0])
    with vltok.apply(model, METHODS[1]) as handle:  # which asks for none where there is no [CLS] token
        model(**inputs_of(REFUSED[key], "image"))
        assert handle.report(file=None).keep_indices


@pytest.mark.parametrize("key", EVERY)
def test_a_family_says_whether_its_attention_is_read(key):
    family, model = view(model_of(key)).family, model_of(key)
    assert family.reads_attention == EVERY[key].shows_patches
    assert family.has_cls(model.model) == EVERY[key].has_cls
