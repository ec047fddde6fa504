"""Asks a selector which tokens of the pictures of a prompt stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vltok.engine.features import Picture, pixel_keys
from vltok.errors import UnsupportedInputError
from vltok.tokens import keep_count
from vltok.views import TokenSelector, VisualTokens

if TYPE_CHECKING:
    from vltok.engine.call import Prompt


def pick_tokens(prompt: Prompt, embeds: torch.Tensor, family: Any) -> torch.Tensor:
    """Choose the tokens to keep of every picture of a prompt, and leave them in `prompt.picks`.

    Args:
        prompt: The prompt, whose pictures are known.
        embeds: What would enter the language model, (B, T, D).
        family: The family of the model.

    Returns:
        Which visual tokens stay, (B, T), bool, on the CPU.
    """
    visual = prompt.visual[:: prompt.repeat]
    flat = embeds.detach()[:: prompt.repeat].flatten(0, 1)
    place = visual.flatten().nonzero().squeeze(1)  # of each visual token in the flattened batch, on the CPU
    keep = torch.zeros_like(visual)
    prompt.picks = [torch.empty(0)] * len(prompt.pictures)
    for members in _alike(prompt):
        pictures = [prompt.pictures[number] for number in members]
        starts = torch.tensor([picture.start for picture in pictures]).unsqueeze(1)
        where = place[starts + torch.arange(pictures[0].length)]  # (G, N)
        kept = _pick(prompt, flat[where.to(flat.device)], pictures, prompt.selector, family)
        keep.view(-1)[where.gather(1, kept.cpu()).flatten()] = True
        for number, indices in zip(members, kept, strict=True):
            prompt.picks[number] = indices
    return keep.repeat_interleave(prompt.repeat, 0)


def _alike(prompt: Prompt) -> list[list[int]]:
    """Pictures of equal length about which the same is known, by number."""
    groups: dict[Any, list[int]] = {}
    for number, picture in enumerate(prompt.pictures):
        has_attention = picture.encoding is not None and picture.encoding.attention is not None
        groups.setdefault((picture.length, has_attention), []).append(number)
    return list(groups.values())


def _pick(
    prompt: Prompt, embeddings: torch.Tensor, pictures: list[Picture], selector: TokenSelector | None, family: Any
) -> torch.Tensor:
    """Ask the selector about pictures of equal length, (G, N, D) -> (G, K)."""
    count, length, _ = embeddings.shape
    device = embeddings.device
    if selector is None:
        return torch.arange(length, device=device).expand(count, length)
    num_keep = keep_count(length, selector.keep_ratio, selector.num_keep)
    if num_keep == length:
        return torch.arange(length, device=device).expand(count, length)
    if not embeddings.isfinite().all():
        raise UnsupportedInputError("the visual tokens contain NaN or infinity; check the image and the model's dtype")
    known = [_known(prompt, picture, selector, family) for picture in pictures]
    keys = [
        pixel_keys(own.unsqueeze(0))[0] if key is None else key
        for own, (key, _, _) in zip(embeddings, known, strict=True)
    ]
    everything = torch.ones(length, dtype=torch.bool)
    attention = [scores for _, scores, _ in known]
    visual = VisualTokens(
        embeddings=embeddings,
        image_keys=torch.stack([key.to(device) for key in keys]),
        attention=None if attention[0] is None else torch.stack([scores.to(device) for scores in attention]),
        is_overview=torch.stack([(everything if own is None else own).to(device) for _, _, own in known]),
    )
    with torch.no_grad():
        return selector.select(visual, num_keep)


def _known(
    prompt: Prompt, picture: Picture, selector: TokenSelector, family: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Key, attention and overview of a picture, None where they are not known or stand for nothing special."""
    wanted = prompt.engine.request_of(selector)
    encoding = picture.encoding
    if wanted is not None and (encoding is None or encoding.request != wanted or encoding.attention is None):
        raise UnsupportedInputError(
            f"{type(selector).__name__} ranks visual tokens by attention in the vision tower, which was not read when "
            "these images were encoded: they were encoded before the method was applied, with other settings, or the "
            "features were moved or changed since; pass pixel_values, or encode them anew"
        )
    if encoding is None:
        return None, None, None
    first = sum(encoding.lengths[: picture.entries.start])
    own = slice(first, first + picture.length)
    scores = family.token_attention(prompt.model, encoding) if wanted is not None else None
    return (
        encoding.keys[picture.entries.start : picture.entries.stop].sum(),
        None if scores is None else scores[own],
        family.overview(prompt.model, encoding, picture),
    )
