"""Draws what the tokens of trained ViTs attend to, side by side: which keys get the attention of all queries.

    python -m eval.attention_maps --data cifar10.npz --model vit_tiny_patch16_224 \
        --model-kwargs img_size=32,patch_size=4,embed_dim=64,depth=4,num_heads=2 \
        --arm "plain@plain-seed0.safetensors=" --arm "tap-adl@tapadl-seed0.safetensors=tap+adl" --out maps.png

Arms are those of eval.image_classification, each with the weights it was trained to. The first rows show pictures with
the attention that each patch receives, averaged over heads, queries and blocks, as they are and with noise; the last
row the whole map, queries by keys, averaged over heads, blocks and pictures. The table has the share of attention that
the most attended tenth of the tokens gets, and the attention diversification loss, over all test pictures asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from eval.image_classification.arms import Arm, find_weights, parse_arm, parse_fields
from eval.image_classification.data import count_classes, open_pictures
from eval.image_classification.models import ModelSpec
from eval.image_classification.preprocess import for_model
from vltok.nn import attention_diversification_loss

CONDITIONS = ("clean", "noise")


@dataclass(frozen=True)
class Concentration:
    """How attention is spread over the tokens, mean over blocks and pictures.

    Attributes:
        arm: The arm.
        condition: "clean" or "noise".
        top_tenth: Share of all attention that the most attended tenth of the tokens receives, in [0, 1].
        diversification: The attention diversification loss with its published threshold.
    """

    arm: str
    condition: str
    top_tenth: float
    diversification: float


@torch.no_grad()
def attention_of(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Attention of all blocks, averaged over heads: (B, 3, H, W) -> (blocks, B, N, N).

    Raises:
        ValueError: If the model is not a ViT of timm with attention maps in all blocks.
    """
    seen: list[torch.Tensor] = []
    hooks = []
    for block in getattr(model, "blocks", ()):
        if hasattr(getattr(block, "attn", None), "attn_drop"):
            block.attn.fused_attn = False  # then the probabilities pass through its dropout
            hooks.append(block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out.mean(1))))
    model.eval()(pictures)
    for hook in hooks:
        hook.remove()
    if not seen or len(seen) < len(model.blocks):
        raise ValueError(f"{type(model).__name__} shows the attention of {len(seen)} blocks; it takes a ViT of timm")
    return torch.stack(seen)


def concentration(maps: torch.Tensor) -> tuple[float, float]:
    """Share of the most attended tenth of the tokens, and the diversification loss, of (blocks, B, N, N)."""
    received = maps.mean(2)  # (blocks, B, N)
    count = max(1, round(received.shape[-1] / 10))
    top = received.topk(count, -1).values.sum(-1).mean()
    return top.item(), attention_diversification_loss([each.unsqueeze(1) for each in maps]).item()


def with_noise(pictures: torch.Tensor, strength: float) -> torch.Tensor:
    """Add Gaussian noise, the same to every arm's pictures."""
    return pictures + strength * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))


def draw(
    path: Path, shown: dict[str, torch.Tensor], maps: dict[tuple[str, str], torch.Tensor], grid: tuple[int, int]
) -> None:
    """Draw pictures, the attention their patches receive under every arm, and the arms' mean maps.

    Args:
        path: Where to.
        shown: The pictures of each condition, (P, 3, H, W), in 0..1.
        maps: By arm and condition, (blocks, B, N, N); the first P are those of the pictures.
        grid: Patches of a picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(dict.fromkeys(arm for arm, _ in maps))
    rows = [(condition, number) for number in range(len(shown["clean"])) for condition in CONDITIONS]
    size = (2 * (1 + len(arms)), 2 * (1 + len(rows)))
    figure, panels = pyplot.subplots(len(rows) + 1, 1 + len(arms), figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat:
        panel.set_axis_off()
    for line, (condition, number) in zip(panels, rows, strict=False):
        line[0].imshow(shown[condition][number].movedim(0, -1).clamp(0, 1).numpy())
        line[0].set_title(condition, fontsize=8)
        received = {arm: _on_grid(maps[arm, condition][:, number], grid) for arm in arms}
        most = max(each.max().item() for each in received.values())
        for panel, arm in zip(line[1:], arms, strict=True):
            panel.imshow(received[arm].numpy(), vmin=0, vmax=most, cmap="magma")
            panel.set_title(arm, fontsize=8)
    whole = {arm: maps[arm, "clean"].mean((0, 1)) for arm in arms}
    most = float(np.quantile(np.concatenate([each.flatten().numpy() for each in whole.values()]), 0.995))
    panels[-1, 0].text(0.5, 0.5, "queries (down)\nby keys (across)", ha="center", va="center", fontsize=8)
    for panel, arm in zip(panels[-1, 1:], arms, strict=True):
        panel.imshow(whole[arm].numpy(), vmin=0, vmax=most, cmap="magma")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _on_grid(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Attention that each patch receives: (blocks, N, N) -> (H, W)."""
    return maps.mean((0, 1))[-grid[0] * grid[1] :].reshape(grid)


def load(arm: Arm, spec: ModelSpec, seed: int, num_classes: int) -> nn.Module:
    """The model of an arm with the weights it was trained to.

    Raises:
        ValueError: If the arm names no file of weights.
    """
    if arm.start is None:
        raise ValueError(f'{arm.name} has no weights; write "{arm.name}@FILE=..." with the file it was trained to')
    return spec.build(seed, num_classes, arm.methods, find_weights(arm.start, arm, seed))[0]


def show(found: Sequence[Concentration]) -> None:
    """Print the table."""
    table = Table(title="where attention goes")
    for name in ("arm", "pictures", "most attended tenth", "diversification loss"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for each in found:
        table.add_row(each.arm, each.condition, f"{100 * each.top_tenth:.1f} %", f"{each.diversification:.3f}")
    Console(width=100).print(table)


def main(
    data: Annotated[Path, typer.Option(help="Folder or npz file of pictures, as for eval.image_classification.")],
    model: Annotated[str, typer.Option(help="A ViT of timm.")],
    arm: Annotated[list[str], typer.Option(help="NAME@WEIGHTS=METHODS, repeated.")],
    model_kwargs: Annotated[str, typer.Option(help="For timm.create_model.")] = "",
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to average over.")] = 200,
    shown: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 3,
    noise: Annotated[float, typer.Option(min=0, help="Strength of the noise, in units of the model's input.")] = 0.4,
    seed: Annotated[int, typer.Option(help='What "{seed}" in file names stands for.')] = 0,
    out: Annotated[Path, typer.Option(help="The figure; numbers go beside it as JSON.")] = Path("attention_maps.png"),
) -> None:
    """Draw what the tokens of trained ViTs attend to."""
    spec = ModelSpec(model, parse_fields(model_kwargs))
    arms = [parse_arm(text) for text in arm]
    source = open_pictures(str(data), "test")
    classes = count_classes(None, source)
    plain = spec.create(seed, classes)
    preprocess = for_model(plain, spec.kwargs.get("in_chans"))
    source.mode = preprocess.mode
    source.transform = preprocess.transform(crops=not source.fits(*preprocess.input_size[1:]))
    chosen = torch.stack([source[index][0] for index in range(min(pictures, len(source)))])
    test = preprocess.normalise(chosen)
    conditions = {"clean": test, "noise": with_noise(test, noise)}
    maps, found = {}, []
    for each in arms:
        net = load(each, spec, seed, classes)
        for condition, batch in conditions.items():
            maps[each.name, condition] = attention_of(net, batch)
            found.append(Concentration(each.name, condition, *concentration(maps[each.name, condition])))
    show(found)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (preprocess.config["mean"], preprocess.config["std"])
    )
    pixels = {condition: batch[:shown] * std + mean for condition, batch in conditions.items()}
    grid = tuple(plain.patch_embed.grid_size)
    draw(out, pixels, maps, grid)
    content = {"model": model, "pictures": len(test), "noise": noise, "concentration": [asdict(each) for each in found]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Console(stderr=True).print(f"written to {out} and {out.with_suffix('.json')}")


if __name__ == "__main__":
    typer.run(main)
