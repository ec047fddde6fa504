"""Asks a selector which tokens of the pictures of a prompt stay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch

from vltok.engine.features import Encoding, pixel_keys
from vltok.engine.pictures import Picture
from vltok.engine.question import Words
from vltok.errors import UnsupportedInputError
from vltok.tokens import Grid3, gather_tokens
from vltok.visual import Selection, TokenSelector, VisualTokens

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


def pick_tokens(prompt: Prompt, embeds: torch.Tensor, family: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the tokens to keep of every picture of a prompt, and leave them in `prompt.picks`.

    Args:
        prompt: The prompt, whose pictures are known.
        embeds: What would enter the language model, (B, T, D).
        family: The family of the model.

    Returns:
        Which visual tokens stay, (B, T), bool, on the CPU; and what enters the language model, (B, T, D).
    """
    visual = prompt.visual[:: prompt.repeat]
    selector = prompt.selector
    is_changing = selector is not None and selector.merges
    flat = (embeds if is_changing else embeds.detach())[:: prompt.repeat].flatten(0, 1)
    place = visual.flatten().nonzero().squeeze(1)  # of each visual token in the flattened batch, on the CPU
    keep = torch.zeros_like(visual)
    picks: list[list[torch.Tensor]] = [[] for _ in prompt.pictures]
    changes: list[tuple[torch.Tensor, torch.Tensor]] = []
    words = Words(prompt, embeds) if selector is not None and {"text", "clip"} & {*selector.needs} else None
    for parts in _alike(prompt, family):
        starts = torch.tensor([prompt.pictures[part.picture].start + part.begin for part in parts]).unsqueeze(1)
        where = place[starts + torch.arange(parts[0].length)]  # (G, N)
        selection = _pick(prompt, flat[where.to(flat.device)], parts, family, words)
        indices = selection.indices.cpu()
        _check(selector, indices, parts)
        kept = where.gather(1, indices)
        keep.view(-1)[kept.flatten()] = True
        if selection.embeddings is not None:
            changes.append((kept.flatten(), selection.embeddings.flatten(0, 1)))
        for part, indices in zip(parts, selection.indices, strict=True):
            picks[part.picture].append(indices + part.begin)
    prompt.picks = [torch.cat(own).sort().values if len(own) > 1 else own[0] for own in picks]
    return keep.repeat_interleave(prompt.repeat, 0), _changed(prompt, embeds, changes)


def _check(selector: TokenSelector | None, indices: torch.Tensor, parts: list[Part]) -> None:
    """Raise ValueError unless these are ascending positions of each part, (G, K), as many as the budget says."""
    length = parts[0].length
    count = length if selector is None else selector.budget(length, parts[0].grid, parts[0].kind)
    fits = indices.dtype == torch.int64 and indices.shape == (len(parts), count) and (indices.diff(dim=1) > 0).all()
    if not fits or not ((indices >= 0) & (indices < length)).all():
        raise ValueError(
            f"{type(selector).__name__}.select() must return ascending positions in 0..{length - 1}, "
            f"({len(parts)}, {count}), int64, got {tuple(indices.shape)}, {indices.dtype}: {indices.tolist()}"
        )


def _check_content(selector: TokenSelector, selection: Selection, visual: VisualTokens) -> None:
    """Raise ValueError unless what a selection puts in the place of tokens can stand there, and may be changed."""
    contents = {name: getattr(selection, name) for name in ("embeddings", "features")}
    given = {name: content for name, content in contents.items() if content is not None}
    if len(given) > 1 or ("features" in given and not visual.can_project):
        raise ValueError(
            "a Selection may have features where VisualTokens.can_project, and no embeddings besides; give embeddings"
        )
    for name, content in given.items():
        expected = (*selection.indices.shape, getattr(visual, name).shape[-1])
        if content.shape != expected:
            raise ValueError(
                f"{type(selector).__name__}.select() must return {name} of shape {expected}, one for each position, "
                f"got {tuple(content.shape)}"
            )
        if not selector.merges:
            raise ValueError(
                f"{type(selector).__name__}.select() changes what the kept tokens are, and its `merges` says that it "
                "doesn't, so no gradients would flow; let `merges` be True"
            )


def _changed(prompt: Prompt, embeds: torch.Tensor, changes: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Put other content in the places of a prompt, (n,) of the flattened batch without repetitions and (n, D) each."""
    if not changes:
        return embeds
    places = torch.cat([where for where, _ in changes]).to(embeds.device)
    values = torch.cat([content for _, content in changes]).to(embeds)
    rows, columns = places // embeds.shape[1], places % embeds.shape[1]
    each = [rows * prompt.repeat + number for number in range(prompt.repeat)]
    return embeds.index_put((torch.cat(each), columns.repeat(prompt.repeat)), values.repeat(prompt.repeat, 1))


def _alike(prompt: Prompt, family: Any) -> list[list[Part]]:
    """Parts of equal length and grid about which the same is known."""
    groups: dict[Any, list[Part]] = {}
    per = "image" if prompt.selector is None else prompt.selector.per
    for number, picture in enumerate(prompt.pictures):
        read = () if picture.encoding is None else tuple(picture.encoding.read)
        for part in _parts(prompt.model, number, picture, per, family):
            groups.setdefault((part.length, part.grid, part.kind, read), []).append(part)
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


def _pick(prompt: Prompt, embeddings: torch.Tensor, parts: list[Part], family: Any, words: Words | None) -> Selection:
    """Ask the selector about parts of equal length, (G, N, D); what it says, projected."""
    selector = prompt.selector
    count, length, _ = embeddings.shape
    device = embeddings.device
    num_keep = length if selector is None else selector.budget(length, parts[0].grid, parts[0].kind)
    if num_keep == length:
        return Selection(torch.arange(length, device=device).expand(count, length))
    remembered = None if words is None else words.recalled(parts)
    if remembered is not None:
        return remembered
    if not embeddings.isfinite().all():
        raise UnsupportedInputError("the visual tokens contain NaN or infinity; check the image and the model's dtype")
    known = [_known(prompt, part, selector, family) for part in parts]
    keys = [
        pixel_keys(own.unsqueeze(0))[0] if each.key is None else each.key
        for own, each in zip(embeddings, known, strict=True)
    ]
    everything = torch.ones(length, dtype=torch.bool)
    overview = [everything if each.overview is None else each.overview for each in known]
    grid = parts[0].grid
    text, text_mask = words.of(parts) if "text" in selector.needs else (None, None)
    read = {name: torch.stack([each.read[name].to(device) for each in known]) for name in known[0].read}
    features = read.get("inputs", read.get("features"))
    has_patch = None if features is None else ~features[..., 0].isnan()
    features = None if features is None else features.masked_fill(~has_patch.unsqueeze(-1), 0)
    clip_image = clip_text = None
    if "clip" in selector.needs:
        clip_image = prompt.engine.text_tower.of_features(features).masked_fill(~has_patch.unsqueeze(-1), 0)
        clip_text = words.in_clip(parts).to(device)
    visual = VisualTokens(
        embeddings=embeddings,
        image_keys=torch.stack([key.to(device) for key in keys]),
        attention=read.get("attention"),
        is_overview=torch.stack([each.to(device) for each in overview]),
        grid=grid,
        coordinates=None if grid is None else coordinates_of(grid, length).to(device).expand(count, length, 3),
        features=features,
        can_project="inputs" in read,
        keys=read["keys"].flatten(-2) if "keys" in read else None,
        num_heads=read["keys"].shape[-2] if "keys" in read else None,
        text=text,
        text_mask=text_mask,
        clip_image=clip_image,
        clip_text=clip_text,
    )
    with nullcontext() if selector.merges else torch.no_grad():
        selection = selector.pick(visual, num_keep)
        _check_content(selector, selection, visual)
        selection = _projected(prompt, selection, visual, has_patch)
    if words is not None:
        words.remember(parts, selection)
    return selection


def _projected(prompt: Prompt, selection: Selection, visual: VisualTokens, has_patch: torch.Tensor | None) -> Selection:
    """A selection whose features, if it has some, have gone through the projector."""
    if selection.features is None:
        return selection
    engine = prompt.engine
    with engine.tape.nothing_encoded():
        merged = engine.family.projector(prompt.model)(selection.features)
    own = gather_tokens(visual.embeddings, selection.indices)
    is_merged = gather_tokens(has_patch, selection.indices).unsqueeze(-1)
    return Selection(selection.indices, torch.where(is_merged, merged.to(own.dtype), own))


def coordinates_of(grid: Grid3, length: int) -> torch.Tensor:
    """Frame, row and column of each token, (N, 3), int64; -1 for those behind the grid."""
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, 3)
    return torch.nn.functional.pad(places, (0, 0, 0, length - len(places)), value=-1)


@dataclass(frozen=True)
class Known:
    """What is known of a part, besides its embeddings.

    Attributes:
        key: A number made from its pixels, or None.
        read: What was read in the tower for each token, (N, ...), by name, as in `Encoding.read`.
        overview: Which tokens show the whole picture, (N,), bool, or None for all.
    """

    key: torch.Tensor | None
    read: dict[str, torch.Tensor]
    overview: torch.Tensor | None


def _known(prompt: Prompt, part: Part, selector: TokenSelector, family: Any) -> Known:
    wanted = prompt.engine.wanted_by(selector)
    picture = prompt.pictures[part.picture]
    encoding = picture.encoding
    if wanted is not None and (encoding is None or encoding.wanted != wanted or not encoding.read):
        raise UnsupportedInputError(
            f"{type(selector).__name__} looks at {' and '.join(wanted.names)} in the vision tower, which nobody looked "
            "at when these images were encoded: they were encoded before the method was applied, with other settings, "
            "or the features were moved or changed since; pass pixel_values, or encode them anew"
        )
    if encoding is None:
        return Known(None, {}, None)
    own = slice(picture.offset + part.begin, picture.offset + part.begin + part.length)
    overview = family.overview(prompt.model, encoding, picture)
    return Known(
        _key(encoding, own.start, part.length),
        {} if wanted is None else {name: _read(prompt, encoding, family, name)[own] for name in encoding.read},
        None if overview is None else overview[part.begin : part.begin + part.length],
    )


def _read(prompt: Prompt, encoding: Encoding, family: Any, name: str) -> torch.Tensor:
    """What was read in the tower, for each visual token of an encoding, (V, ...)."""
    if name not in encoding.notes:
        fill = {"attention": -math.inf, "keys": 0.0}.get(name, math.nan)
        values = family.of_tokens(prompt.model, encoding.whole or encoding, name, fill)
        encoding.notes[name] = values if encoding.seen is None else values[encoding.seen.to(values.device)]
    return encoding.notes[name]


def _key(encoding: Encoding, offset: int, length: int) -> torch.Tensor:
    """A number made from the pixels behind some tokens of an encoding, int64; parts of one span differ by place."""
    begins = list(accumulate(encoding.spans, initial=0))
    own = [n for n, (a, b) in enumerate(pairwise(begins)) if a < offset + length and offset < b]
    return encoding.keys[own].sum() + (offset - begins[own[0]])
