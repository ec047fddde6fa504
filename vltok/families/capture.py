"""Keeping transformers' capture of hidden states and attention maps whole while modules come and go."""

from __future__ import annotations

from torch import nn

from vltok.edits import Edits

_FLAG = "_output_capturing_hooks_installed"
_HOOK = "output_capturing_hook"


def restore_output_capture(edits: Edits, model: nn.Module) -> None:
    """At undo, take off the capturing hooks that transformers put on meanwhile.

    transformers puts them on all modules at once, the first time something is to be captured, and not on one that was
    swapped out then. Without them it does so again when it next needs them.
    """
    before = [module for module in model.modules() if getattr(module, _FLAG, False)]

    def undo() -> None:
        for module in model.modules():
            if getattr(module, _FLAG, False) and module not in before:
                delattr(module, _FLAG)
                for part in module.modules():
                    hooks = part._forward_hooks
                    for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == _HOOK]:
                        del hooks[key]

    edits.at_undo(undo)
