"""Says which tokens of a prompt somebody asked, where labels or a draft model bring answers along.

Answers are what training looks at, and what a draft model guessed. Decisions hang on what stands before them.
"""

from __future__ import annotations

import torch

from vltok.engine.prompt import Prompt


def prompt_text(prompt: Prompt) -> torch.Tensor:
    """Text of each sample behind its first visual token, up to its first answer or guess, (B, T), bool, on the CPU."""
    visual, answered = prompt.visual, answered_in(prompt)
    text = torch.zeros_like(visual)
    for own in each_sample(prompt):
        behind = own & ((visual & own).cumsum(1) > 0)
        text |= behind & ((answered & behind).cumsum(1) == 0)
    return text & prompt.attended & ~visual


def whole_prompt(prompt: Prompt) -> torch.Tensor:
    """Tokens of each sample up to the first answer or guess behind its last visual token, (B, T), bool, on the CPU.

    Of several turns, as training has them, the prompt is what the model is asked when it has seen all images.
    """
    visual, answered = prompt.visual, answered_in(prompt)
    asked = torch.zeros_like(visual)
    for own in each_sample(prompt):
        seen = (visual & own).cumsum(1)
        behind = own & ~visual & (seen == seen[:, -1:])
        asked |= own & ((answered & behind).cumsum(1) == 0)
    return asked & prompt.attended


def until_answered(prompt: Prompt) -> torch.Tensor:
    """Text of each sample up to its first answer or guess, (B, T), bool, on the CPU."""
    answered = answered_in(prompt)
    text = torch.zeros_like(prompt.visual)
    for own in each_sample(prompt):
        text |= own & ((answered & own).cumsum(1) == 0)
    return text & prompt.attended & ~prompt.visual


def answered_in(prompt: Prompt) -> torch.Tensor:
    """What is an answer that training looks at, or was guessed, (B, T), bool, on the CPU."""
    labels = prompt.hints.labels
    answered = torch.zeros_like(prompt.visual) if labels is None else labels.cpu() != -100
    if prompt.hints.guesses:
        answered[:, -prompt.hints.guesses :] = True
    return answered


def each_sample(prompt: Prompt) -> list[torch.Tensor]:
    """Which tokens are of the first sample of each row, of the second, ..., (B, T) each, bool, on the CPU."""
    samples = prompt.samples()
    if samples is None:
        return [torch.ones_like(prompt.visual)]
    return [samples.cpu() == number for number in range(int(samples.max()) + 1)]
