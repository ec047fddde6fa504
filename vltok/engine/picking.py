"""Asks a selector which tokens of the pictures of a prompt stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch

from vltok.engine.features import Encoding, pixel_keys
from vltok.engine.pictures import Picture
from vltok.errors import UnsupportedInputError
from vltok.tokens import Grid3
from vltok.views import TokenSelector, VisualTokens

if TYPE_CHECKING:
    from vltok.engine.prompt import Prompt


@dataclass(frozen=True)
class Part:
    """Visual tokens that share a budget: a picture, or a tile or frame of one.

    Attributes:
        picture: Its number among the pictures of the prompt.
        begin: Its first token among those of the picture.
        length: Its tokens, N.
        grid: Frames, rows and columns that its tokens form, or None.
        kind: "image" or "video".
    """

    picture: int
    begin: int
    length: int
    grid: Grid3 | None
    kind: str


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
    picks: list[list[torch.Tensor]] = [[] for _ in prompt.pictures]
    for parts in _alike(prompt, family):
        starts = torch.tensor([prompt.pictures[part.picture].start + part.begin for part in parts]).unsqueeze(1)
        where = place[starts + torch.arange(parts[0].length)]  # (G, N)
        kept = _pick(prompt, flat[where.to(flat.device)], parts, family)
        keep.view(-1)[where.gather(1, kept.cpu()).flatten()] = True
        for part, indices in zip(parts, kept, strict=True):
            picks[part.picture].append(indices + part.begin)
    prompt.picks = [torch.cat(own).sort().values if len(own) > 1 else own[0] for own in picks]
    return keep.repeat_interleave(prompt.repeat, 0)


def _alike(prompt: Prompt, family: Any) -> list[list[Part]]:
    """Parts of equal length and grid about which the same is known."""
    groups: dict[Any, list[Part]] = {}
    per = "image" if prompt.selector is None else prompt.selector.per
    for number, picture in enumerate(prompt.pictures):
        has_attention = picture.encoding is not None and bool(picture.encoding.attention)
        for part in _parts(prompt.model, number, picture, per, family):
            groups.setdefault((part.length, part.grid, part.kind, has_attention), []).append(part)
    return list(groups.values())


def _parts(model: torch.nn.Module, number: int, picture: Picture, per: str, family: Any) -> Iterator[Part]:
    """A picture, or its tiles or frames where these have budgets of their own and are known."""
    encoding, lengths = picture.encoding, [picture.length]
    whole = None if encoding is None else family.grid(model, encoding, picture.offset, picture.length)
    grids = [whole]
    if per == "frame" and whole is not None and picture.kind == "video":
        frames, rows, columns = whole
        lengths = [rows * columns] * (frames - 1) + [picture.length - (frames - 1) * rows * columns]
        grids = [(1, rows, columns)] * frames
    elif encoding is not None and per == ("frame" if picture.kind == "video" else "tile"):
        begin, end = picture.offset, picture.offset + picture.length
        inside = {each for each in (*accumulate(encoding.lengths), *accumulate(encoding.spans)) if begin < each < end}
        lengths = [b - a for a, b in pairwise([begin, *sorted(inside), end])]
        begins = accumulate(lengths, initial=begin)
        grids = [family.grid(model, encoding, a, n) for a, n in zip(begins, lengths, strict=False)]
    begins = list(accumulate(lengths, initial=0))[:-1]
    for begin, length, grid in zip(begins, lengths, grids, strict=True):
        yield Part(number, begin, length, grid, picture.kind)


def _pick(prompt: Prompt, embeddings: torch.Tensor, parts: list[Part], family: Any) -> torch.Tensor:
    """Ask the selector about parts of equal length, (G, N, D) -> (G, K)."""
    selector = prompt.selector
    count, length, _ = embeddings.shape
    device = embeddings.device
    num_keep = length if selector is None else selector.budget(length, parts[0].grid, parts[0].kind)
    if num_keep == length:
        return torch.arange(length, device=device).expand(count, length)
    if not embeddings.isfinite().all():
        raise UnsupportedInputError("the visual tokens contain NaN or infinity; check the image and the model's dtype")
    known = [_known(prompt, part, selector, family) for part in parts]
    keys = [
        pixel_keys(own.unsqueeze(0))[0] if key is None else key
        for own, (key, _, _) in zip(embeddings, known, strict=True)
    ]
    everything = torch.ones(length, dtype=torch.bool)
    attention = [scores for _, scores, _ in known]
    grid = parts[0].grid
    visual = VisualTokens(
        embeddings=embeddings,
        image_keys=torch.stack([key.to(device) for key in keys]),
        attention=None if attention[0] is None else torch.stack([scores.to(device) for scores in attention]),
        is_overview=torch.stack([(everything if own is None else own).to(device) for _, _, own in known]),
        grid=grid,
        coordinates=None if grid is None else coordinates_of(grid, length).to(device).expand(count, length, 3),
    )
    with torch.no_grad():
        return selector.select(visual, num_keep)


def coordinates_of(grid: Grid3, length: int) -> torch.Tensor:
    """Frame, row and column of each token, (N, 3), int64; -1 for those behind the grid."""
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, 3)
    return torch.nn.functional.pad(places, (0, 0, 0, length - len(places)), value=-1)


def _known(
    prompt: Prompt, part: Part, selector: TokenSelector, family: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Key, attention and overview of a part, None where they are not known or stand for nothing special."""
    wanted = prompt.engine.request_of(selector)
    picture = prompt.pictures[part.picture]
    encoding = picture.encoding
    if wanted is not None and (encoding is None or encoding.request != wanted or not encoding.attention):
        raise UnsupportedInputError(
            f"{type(selector).__name__} ranks visual tokens by attention in the vision tower, which was not read when "
            "these images were encoded: they were encoded before the method was applied, with other settings, or the "
            "features were moved or changed since; pass pixel_values, or encode them anew"
        )
    if encoding is None:
        return None, None, None
    own = slice(picture.offset + part.begin, picture.offset + part.begin + part.length)
    scores = _attention(prompt, encoding, family) if wanted is not None else None
    overview = family.overview(prompt.model, encoding, picture)
    return (
        _key(encoding, own.start, part.length),
        None if scores is None else scores[own],
        None if overview is None else overview[part.begin : part.begin + part.length],
    )


def _attention(prompt: Prompt, encoding: Encoding, family: Any) -> torch.Tensor:
    """The attention that was read, for each visual token of an encoding, (V,), float32."""
    if "attention" not in encoding.notes:
        scores = family.token_attention(prompt.model, encoding.whole or encoding)
        encoding.notes["attention"] = scores if encoding.seen is None else scores[encoding.seen.to(scores.device)]
    return encoding.notes["attention"]


def _key(encoding: Encoding, offset: int, length: int) -> torch.Tensor:
    """A number made from the pixels behind some tokens of an encoding, int64; parts of one span differ by place."""
    begins = list(accumulate(encoding.spans, initial=0))
    own = [n for n, (a, b) in enumerate(pairwise(begins)) if a < offset + length and offset < b]
    return encoding.keys[own].sum() + (offset - begins[own[0]])
