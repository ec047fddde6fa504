"""Parts of a model as it is now: what runs inside a wrapper, what attends, and which part of an attention is which."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from vltok.engine.weights import check_at_hand
from vltok.errors import UnsupportedModelError
from vltok.views import Projection, SelfAttention
from vltok.visual import TokenRule

_ATTENTION = ("self_attn", "attention", "attn")
_ROLES = {
    "query": re.compile(r"(.*\.)?(W_)?q(uery)?(_proj)?"),
    "key": re.compile(r"(.*\.)?k(ey)?(_proj)?"),
    "value": re.compile(r"(.*\.)?v(alue)?(_proj)?"),
    "fused": re.compile(r"(.*\.)?qkv(_proj)?"),
}
_HEADS = ("num_heads", "num_attention_heads")
_SCALES = ("scale", "scaling")
_BIASES = ("q_bias", "k_bias", "v_bias")


def live(module: nn.Module) -> nn.Module:
    """The copy of a part that runs now, where PEFT keeps several of it (`modules_to_save`); else the part itself."""
    children = dict(module.named_children())
    copies = children.get("modules_to_save")
    if "original_module" not in children or not isinstance(copies, nn.ModuleDict):
        return module
    active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
    is_off = getattr(module, "disable_adapters", False) or not active
    return children["original_module"] if is_off else copies[active[0]]


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention module of a decoder layer or of a block of a vision tower, or None if no name is known."""
    return next(
        (getattr(layer, name) for name in _ATTENTION if isinstance(getattr(layer, name, None), nn.Module)), None
    )


def layers_read(rule: TokenRule, decoder: nn.Module) -> frozenset[int]:
    """The decoder layers that a rule looks at, from 0: where one has no attention, the next that has, or the last."""
    attending = [index for index, layer in enumerate(decoder.layers) if attention_of(layer) is not None]
    wanted = [number - 1 for number in rule.layers(len(decoder.layers))]
    return frozenset(
        next((each for each in attending if each >= index), max(attending, default=index)) for index in wanted
    )


def find_attention(block: nn.Module) -> str | None:
    """Name of the child of a block that attends: the one with heads, and a layer for queries or for all three."""
    found = [name for name, child in block.named_children() if num_heads(child) and _projects_queries(child)]
    return found[0] if len(found) == 1 else None


def read_attention(module: nn.Module, dim: int) -> SelfAttention:
    """Take a self-attention apart.

    Args:
        module: The attention.
        dim: Width of the tokens, C.

    Raises:
        UnsupportedModelError: If projections are missing, quantised or of another width, other parts have weights, or
            the weights aren't at hand.
    """
    check_at_hand(module, f"the attention of this vision tower, {type(module).__name__},")
    layers = _linear_layers(module)
    biases = {role: getattr(module, f"{role[0]}_bias", None) for role in ("query", "key", "value")}
    if "fused" in layers:
        layer = layers["fused"]
        weights = layer.weight.chunk(3)
        parts = dict(zip(("query", "key", "value"), weights, strict=True))
        own = layer.bias.chunk(3) if layer.bias is not None else (biases["query"], biases["key"], biases["value"])
        projections: dict[str, Projection] = {
            role: (weight, bias) for (role, weight), bias in zip(parts.items(), own, strict=True)
        }
    else:
        projections = {
            role: (layers[role].weight, layers[role].bias if layers[role].bias is not None else biases[role])
            for role in ("query", "key", "value")
            if role in layers
        }
    if "out" in layers:
        projections["out"] = (layers["out"].weight, layers["out"].bias)
    if missing := {"query", "key", "value", "out"} - projections.keys():
        raise _unsupported(module, f"has no linear layer for {', '.join(sorted(missing))}")
    for role, (weight, _) in projections.items():
        if not weight.is_floating_point() or type(weight.data) is not torch.Tensor:
            raise _unsupported(module, f"projects {role} by quantised weights ({type(weight.data).__name__})")
        if weight.shape != (dim, dim):
            raise _unsupported(module, f"projects {role} by {tuple(weight.shape)}, not {dim} -> {dim}")
    known = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    known |= {id(bias) for bias in biases.values() if bias is not None}
    if others := [name for name, parameter in module.named_parameters() if id(parameter) not in known]:
        raise _unsupported(module, f"has further weights, {', '.join(others)}")
    leaves = {name: part for name, part in module.named_modules() if not list(part.children())}
    if others := [name for name, part in leaves.items() if not isinstance(part, nn.Linear | nn.Dropout | nn.Identity)]:
        raise _unsupported(module, f"has further parts, {', '.join(others)}")
    return SelfAttention(module, num_heads(module), **projections)


def tokens_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The tokens among the arguments a block calls its attention with.

    Raises:
        ValueError: If there is a mask or a position embedding among them, which change what attention means, or
            attention maps are asked for.
    """
    tokens, wanted = split_arguments(args, kwargs)
    wanted += ["output_attentions"] if kwargs.get("output_attentions") is True else []
    if wanted:
        raise ValueError(
            f"{type(module).__name__} attends from all tokens to all, but its block asks for more, by "
            f"{', '.join(wanted)}: masks, rotary positions and attention maps are not to be had; take the method off "
            "for that"
        )
    return tokens


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, list[str]]:
    """The tokens among the arguments of an attention, and the names of those that change what it means.

    Single numbers, such as how many items are in a batch, are passed down by trainers and change nothing.
    """
    given = {**{f"argument {place}": value for place, value in enumerate(args)}, **kwargs}
    tokens = given.pop(next(iter(given)))
    tensors = [name for name, value in given.items() if _has_tensor(value)]
    return tokens, tensors + [name for name in ("is_causal",) if given.get(name) is True]


def _has_tensor(value: Any) -> bool:
    """Whether an argument is a tensor of more than one number, or several of these, as rotary positions are."""
    if isinstance(value, tuple | list):
        return any(map(_has_tensor, value))
    return isinstance(value, torch.Tensor) and value.dim() > 0


def num_heads(module: nn.Module) -> int:
    """Heads of an attention module, 0 if neither it nor a part of it has such a number."""
    return _number(module, _HEADS, int) or 0


def is_nested(module: nn.Module) -> bool:
    """Whether an attention module leaves attending to a part of it, and returns tokens alone."""
    return not any(hasattr(module, name) for name in _HEADS)


def _projects_queries(module: nn.Module) -> bool:
    patterns = _ROLES["query"], _ROLES["fused"]
    return any(pattern.fullmatch(name) for name, _ in module.named_modules() for pattern in patterns if name)


def attention_scale(module: nn.Module) -> float | None:
    """What products of queries and keys are multiplied by, or None if no part of the module has such a number."""
    return _number(module, _SCALES, float)


def _number(module: nn.Module, names: tuple[str, ...], kind: type) -> Any:
    """The number of one of these names, of a module or of the one part that has it."""
    numbers = [
        [getattr(part, name) for name in names if isinstance(getattr(part, name, None), kind)]
        for part in module.modules()
    ]
    found = [each[0] for each in numbers if each]
    return found[0] if numbers[0] or len(found) == 1 else None


def score_layers(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The layers that give queries and keys, whatever their type, so that adapters on them count.

    Norms of queries and keys come last where there are any, also those that do nothing. None if there are no such
    layers, or if further weights may have a part in the probabilities.
    """
    if any(name not in _BIASES for name, _ in module.named_parameters(recurse=False)):
        return None
    children = dict(module.named_modules())
    for names in (("q_norm", "k_norm"), (_ROLES["query"], _ROLES["key"])):
        found = [
            next((child for name, child in children.items() if name and re.fullmatch(pattern, name)), None)
            for pattern in names
        ]
        if None not in found:
            return found[0], found[1]
    return None


def _linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by role; the one that is neither query, key, value nor all three is the output projection."""
    layers: dict[str, nn.Linear] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            role = next((role for role, pattern in _ROLES.items() if pattern.fullmatch(name)), "out")
            layers.setdefault(role, layer)
    return layers


def _unsupported(module: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the attention of this vision tower can't be replaced: {type(module).__name__} {reason}; what can is plain "
        "multi-head self-attention, as in CLIP, SigLIP, ViT and DINOv2 of transformers and most ViTs of timm"
    )
