"""A slow reference for pruned models: one prompt at a time, no cache, no hooks, nothing of vltok.

The prompt is put together with the model's own public parts (embedding table, image encoder, rotary positions) and run
through the decoder layers in a plain loop. A token that is gone is simply not there; a token that stage 2 dropped is
there but hidden from every query by an explicit mask in the later layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    images: list[torch.Tensor]
    lm: nn.Module
    head: nn.Module

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
    steps = row.next_position + torch.arange(len(ids))
    return Row(
        torch.cat([row.embeds, embeds]),
        torch.cat([row.positions, steps.expand(*row.positions.shape[:-1], -1)], dim=-1),
        torch.cat([row.visual, torch.zeros(len(ids), dtype=torch.bool)]),
        row.images,
        row.lm,
        row.head,
    )


def without(row: Row, token: int) -> Row:
    """The row without a token behind its images; the others stay where they stand."""
    rest = torch.arange(len(row.embeds)) != token
    return Row(row.embeds[rest], row.positions[..., rest], row.visual[rest], row.images, row.lm, row.head)


def kept(row: Row, picks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where the tokens are that stay if only `picks` of each image do, ascending."""
    stay = ~row.visual
    for image, pick in zip(row.images, picks, strict=True):
        stay[image[pick]] = True
    return stay.nonzero().squeeze(1)


def logits(
    row: Row, picks: Sequence[torch.Tensor], *, reindex: bool = False, hidden_after: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kept tokens through the decoder.

    Args:
        row: The prompt.
        picks: Kept tokens of each image.
        reindex: Count positions anew instead of keeping them.
        hidden_after: Hide visual keys from all queries in the layers after this one, counted from 1.

    Returns:
        Logits of the kept tokens, (P, V), and where these are in the prompt, (P,).
    """
    where = kept(row, picks)
    positions = (
        torch.arange(len(where)).expand(row.positions[..., where].shape) if reindex else row.positions[..., where]
    )
    hidden = row.embeds[where].unsqueeze(0)
    rotary = row.lm.rotary_emb(hidden, positions.unsqueeze(-2))
    causal = torch.ones(len(where), len(where), dtype=torch.bool).tril()
    for number, layer in enumerate(row.lm.layers, start=1):
        seen = causal.clone()
        if hidden_after is not None and number > hidden_after:
            seen &= ~row.visual[where]
            seen.fill_diagonal_(True)  # a visual query must attend to something; nobody looks at what becomes of it
        mask = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
    return row.head(row.lm.norm(hidden))[0], where


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
    output = eager.model.language_model(
        inputs_embeds=row.embeds[where].unsqueeze(0),
        position_ids=row.positions[..., where].unsqueeze(-2),
        attention_mask=torch.ones(1, len(where), dtype=torch.long),
        output_attentions=True,
    )
    attention = output.attentions[layer - 1][0].mean(0)  # (P, P)
    visual = row.visual[where]
    text = ~visual & (visual.cumsum(0) > 0)
    alpha_tv = attention[text][:, visual].sum() / attention[text].sum()
    alpha_vt = attention[visual][:, text].sum() / attention[visual].sum()
    return float(alpha_tv), float(alpha_vt)
