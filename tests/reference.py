"""Two slow references for pruned models. Neither knows anything of vltok.

The first runs one prompt at a time, without cache and hooks. The prompt is put together with the model's own public
parts (embedding table, image encoder, rotary positions) and run through the decoder layers in a plain loop. A token
that is gone is simply not there; a token that was dropped inside the decoder is there but hidden from every query by an
explicit mask in the later layers. Sliding and chunked windows are counted in the tokens' indices in the unpruned
prompt, or, where positions are counted anew, in the kept tokens. `join` puts a second turn behind a first, `pack` puts
samples into one row.

The second, `hidden_keys`, is the unpruned model, whose own masks get a column of -inf for every token that is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from tiny import TinyFamily
from torch import nn


@dataclass
class Row:
    """One prompt as it enters the decoder, unpruned.

    Attributes:
        embeds: (T, D).
        positions: Rotary positions, (T,) or (3, T).
        visual: Which tokens are visual, (T,), bool.
        images: Where the tokens of each image are, (N,) each.
        lm: The language model; `head` turns its output into logits.
        index: Where each token stands in its sample, (T,). Windows are counted in these.
        sample: The sample of each token, (T,): tokens of different samples don't see each other.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    images: list[torch.Tensor]
    lm: nn.Module
    head: nn.Module
    index: torch.Tensor | None = None
    sample: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.index is None:
            self.index = torch.arange(len(self.embeds))
        if self.sample is None:
            self.sample = torch.zeros(len(self.embeds), dtype=torch.long)

    @property
    def next_position(self) -> int:
        """Position of the token after the prompt."""
        return int(self.positions.max()) + 1


def read(model: nn.Module, family: TinyFamily, prompt: str, pictures: Sequence[Image.Image] = ()) -> Row:
    """Encode one prompt. `pictures` have the family's `size` or `other_size`."""
    inputs = family.inputs([prompt], pictures)
    ids = inputs.input_ids
    embeds = model.get_input_embeddings()(ids)[0]
    visual = ids[0] == model.config.image_token_id
    positions = torch.arange(len(embeds))
    if pictures:
        names = ("pixel_values", "image_sizes", "image_grid_thw")
        encoded = model.model.get_image_features(**{k: inputs[k] for k in names if k in inputs}, return_dict=True)
        features = torch.cat([image.reshape(-1, embeds.shape[1]) for image in encoded.pooler_output])
        embeds = embeds.masked_scatter(visual.unsqueeze(1), features)
    if hasattr(model.model, "get_rope_index"):
        positions = positions.expand(3, -1)
        if pictures:
            positions = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})[0][:, 0]
    lengths = [family.tokens[0 if picture.size == family.size else 1] for picture in pictures]
    images = list(visual.nonzero().squeeze(1).split(lengths)) if pictures else []
    return Row(embeds, positions, visual, images, model.model.language_model, model.lm_head)


def extend(row: Row, model: nn.Module, ids: Sequence[int]) -> Row:
    """The row with text tokens behind it, which stand where the model would put them."""
    if not len(ids):
        return row
    embeds = model.get_input_embeddings()(torch.tensor(ids))
    steps = torch.arange(len(ids)).expand(*row.positions.shape[:-1], -1)
    text = torch.zeros(len(ids), dtype=torch.bool)
    return join(row, Row(embeds, steps, text, [], row.lm, row.head))


def join(row: Row, turn: Row) -> Row:
    """The row with another turn behind it, which may bring images of its own."""
    length = len(row.embeds)
    return replace(
        row,
        embeds=torch.cat([row.embeds, turn.embeds]),
        positions=torch.cat([row.positions, turn.positions + row.next_position], dim=-1),
        visual=torch.cat([row.visual, turn.visual]),
        images=[*row.images, *(image + length for image in turn.images)],
        index=torch.cat([row.index, turn.index + int(row.index[-1]) + 1]),
        sample=torch.cat([row.sample, row.sample[-1:].expand(len(turn.embeds))]),
    )


def pack(rows: Sequence[Row]) -> Row:
    """Several samples in one row: positions start again in each, and none sees another."""
    starts = [sum(len(row.embeds) for row in rows[:number]) for number in range(len(rows))]
    return replace(
        rows[0],
        embeds=torch.cat([row.embeds for row in rows]),
        positions=torch.cat([row.positions for row in rows], dim=-1),
        visual=torch.cat([row.visual for row in rows]),
        images=[image + start for row, start in zip(rows, starts, strict=True) for image in row.images],
        index=torch.cat([row.index for row in rows]),
        sample=torch.cat([torch.full((len(row.embeds),), number) for number, row in enumerate(rows)]),
    )


def without(row: Row, token: int) -> Row:
    """The row without a token behind its images; the others stay where they stand."""
    rest = torch.arange(len(row.embeds)) != token
    return replace(
        row,
        embeds=row.embeds[rest],
        positions=row.positions[..., rest],
        visual=row.visual[rest],
        index=row.index[rest],
        sample=row.sample[rest],
    )


def kept(row: Row, picks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where the tokens are that stay if only `picks` of each image do, ascending."""
    stay = ~row.visual
    for image, pick in zip(row.images, picks, strict=True):
        stay[image[pick]] = True
    return stay.nonzero().squeeze(1)


def windows(lm: nn.Module) -> list[tuple[str, int]]:
    """What every decoder layer sees: ("full", 0), or ("sliding", W) or ("chunked", C) tokens."""
    config = lm.config
    sliding = getattr(config, "sliding_window", None)
    default = "sliding_attention" if sliding else "full_attention"
    kinds = getattr(config, "layer_types", None) or [default] * len(lm.layers)
    sizes = {"full": 0, "sliding": sliding, "chunked": getattr(config, "attention_chunk_size", None)}
    return [(kind, sizes[kind]) for kind in (kind.removesuffix("_attention") for kind in kinds)]


def in_window(kind: str, size: int, index: torch.Tensor) -> torch.Tensor:
    """Which keys a window leaves to each query, (S, S), bool, for tokens that stand at `index`, (S,)."""
    query, key = index[:, None], index[None, :]
    if kind == "sliding":
        return query - key < size
    if kind == "chunked":
        return query // size == key // size
    return torch.ones(len(index), len(index), dtype=torch.bool)


def counted(sample: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... anew in every sample, (S,)."""
    return torch.cat([torch.arange(int(count)) for count in sample.unique_consecutive(return_counts=True)[1]])


def leaving(row: Row, hidden_after: int | Sequence[int | None] | None) -> torch.Tensor:
    """The layer after which each token is hidden, (T,), counted from 1; a large number for those that stay."""
    layers = hidden_after if isinstance(hidden_after, Sequence) else [hidden_after] * len(row.images)
    gone = torch.full((len(row.embeds),), len(row.lm.layers) + 1)
    for image, layer in zip(row.images, layers, strict=True):
        gone[image] = len(row.lm.layers) + 1 if layer is None else layer
    return gone


def logits(
    row: Row,
    picks: Sequence[torch.Tensor],
    *,
    reindex: bool = False,
    hidden_after: int | Sequence[int | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kept tokens through the decoder.

    Args:
        row: The prompt.
        picks: Kept tokens of each image.
        reindex: Count positions, and the tokens of windows, anew instead of keeping them.
        hidden_after: Hide visual keys from all queries in the layers after this one, counted from 1; or a list of one
            such layer, or None, for each image.

    Returns:
        Logits of the kept tokens, (P, V), and where these are in the prompt, (P,).
    """
    where = kept(row, picks)
    positions, index, sample = row.positions[..., where], row.index[where], row.sample[where]
    if reindex:
        index = counted(sample)
        positions = index.expand(positions.shape)
    gone = leaving(row, hidden_after)[where]
    hidden = row.embeds[where].unsqueeze(0)
    rotary = row.lm.rotary_emb(hidden, positions.unsqueeze(-2))
    causal = torch.ones(len(where), len(where), dtype=torch.bool).tril() & (sample[:, None] == sample)
    for number, (layer, window) in enumerate(zip(row.lm.layers, windows(row.lm), strict=True), start=1):
        seen = causal & in_window(*window, index) & (number <= gone)
        seen.fill_diagonal_(True)  # a dropped query must attend to something; nobody looks at what becomes of it
        mask = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
    return row.head(row.lm.norm(hidden))[0], where


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Compare logits: at most `tolerance` of the largest expected one, or of 1, apart."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@contextmanager
def hidden_keys(eager: nn.Module, dropped: torch.Tensor | Sequence[torch.Tensor]) -> Iterator[None]:
    """Hide keys from every query of an unpruned model, in calls without a cache.

    Args:
        eager: The whole model, with eager attention: its layers then get a mask in any case.
        dropped: Which tokens of the calls are hidden, (B, T), bool, or one such tensor for every decoder layer.
            Tokens behind these stay.
    """
    layers = eager.model.language_model.layers
    columns = [dropped] * len(layers) if isinstance(dropped, torch.Tensor) else dropped

    def hide(number: int) -> Any:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            mask = kwargs["attention_mask"]  # (B, 1, T, T)
            gone = torch.nn.functional.pad(columns[number], (0, mask.shape[-1] - columns[number].shape[-1]))
            return args, {
                **kwargs,
                "attention_mask": mask.masked_fill(gone[:, None, None], torch.finfo(mask.dtype).min),
            }

        return hook

    hooks = [
        layer.register_forward_pre_hook(hide(number), with_kwargs=True, prepend=True)
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def dropped(row: Row, picks: Sequence[torch.Tensor], hidden_after: int | None = None) -> list[torch.Tensor]:
    """What `hidden_keys` has to hide of a row, for every decoder layer, (1, T) each."""
    gone = torch.ones(len(row.embeds), dtype=torch.bool)
    gone[kept(row, picks)] = False
    leaves = leaving(row, hidden_after)
    return [(gone | (number > leaves))[None] for number in range(1, len(row.lm.layers) + 1)]


@torch.no_grad()
def greedy(row: Row, model: nn.Module, picks: Sequence[torch.Tensor], steps: int, **options: object) -> list[int]:
    """Continue the prompt word by word, everything computed again for every word."""
    words: list[int] = []
    for _ in range(steps):
        scores = logits(extend(row, model, words), picks, **options)[0][-1].clone()
        scores[model.generation_config.suppress_tokens] = -torch.inf
        words.append(int(scores.argmax()))
    return words


@torch.no_grad()
def attention_ratios(eager: nn.Module, row: Row, picks: Sequence[torch.Tensor], layer: int) -> tuple[float, float]:
    """alpha_tv and alpha_vt of ToDRE at a layer (counted from 1) from the materialised attention of an eager model."""
    where = kept(row, picks)
    with hidden_keys(eager, dropped(row, picks)):
        output = eager.model.language_model(
            inputs_embeds=row.embeds.unsqueeze(0),
            position_ids=row.positions.unsqueeze(-2),
            attention_mask=torch.ones(1, len(row.embeds), dtype=torch.long),
            output_attentions=True,
            use_cache=False,
        )
    attention = output.attentions[layer - 1][0].mean(0)[where][:, where]  # (P, P)
    visual = row.visual[where]
    text = ~visual & (visual.cumsum(0) > 0)
    alpha_tv = attention[text][:, visual].sum() / attention[text].sum()
    alpha_vt = attention[visual][:, text].sum() / attention[visual].sum()
    return float(alpha_tv), float(alpha_vt)
