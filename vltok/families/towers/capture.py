"""transformers' capture of hidden states and attention maps, around attention that was swapped."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vltok.edits import Edits
from vltok.errors import UnsupportedInputError

_FLAG = "_output_capturing_hooks_installed"
_HOOK = "output_capturing_hook"


def refuse_maps(tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before the tower: refuse attention maps, which attention without a softmax doesn't have.

    Raises:
        UnsupportedInputError: If they are asked for, by argument or by config.
    """
    wanted = kwargs.get("output_attentions")
    if wanted is None:
        wanted = getattr(getattr(tower, "config", None), "output_attentions", False)
    if wanted:
        raise UnsupportedInputError(
            f"attention maps are not to be had of {type(tower).__name__} while attention in its blocks is replaced; "
            "leave out output_attentions, or take the method off for that"
        )


def restore_output_capture(edits: Edits, model: nn.Module) -> None:
    """At undo, take off the capturing hooks that transformers put on meanwhile.

    transformers puts them on all modules at once, the first time something is to be captured, and not on one that was
    swapped out then. Without them it does so again when it next needs them.
    """
    before = [module for module in model.modules() if getattr(module, _FLAG, False)]
    edits.at_undo(partial(_take_off, model, before))


def _take_off(model: nn.Module, before: list[nn.Module]) -> None:
    for module in model.modules():
        if getattr(module, _FLAG, False) and module not in before:
            delattr(module, _FLAG)
            for part in module.modules():
                hooks = part._forward_hooks
                for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == _HOOK]:
                    del hooks[key]
