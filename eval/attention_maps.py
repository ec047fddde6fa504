"""Draws what the tokens of trained ViTs attend to, side by side: which keys get the attention of all queries.

    python -m eval.attention_maps
    python -m eval.attention_maps --data cifar10.npz --model vit_tiny_patch16_224 \
        --model-kwargs img_size=32,patch_size=4,embed_dim=64,depth=4,num_heads=2 \
        --arm "plain@plain-seed0.safetensors=" --arm "tap-adl@tapadl-seed0.safetensors=tap+adl" --out maps.png

Arms are those of eval.image_classification, each with the weights it was trained to. Without --data they are trained
here and now on scikit-learn's handwritten digits, which takes a minute or two. The first rows show pictures with the
attention that each patch receives, averaged over heads, queries and blocks, as they are and with noise; the last row
the whole map, queries by keys, averaged over heads, blocks and pictures. The table has the share of attention that the
most attended tenth of the tokens gets, and the attention diversification loss, over all test pictures asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from eval import options
from eval.image_classification.arms import Arm, find_weights, parse_arm, parse_fields
from eval.image_classification.data import count_classes, open_pictures
from eval.image_classification.models import ModelSpec
from eval.image_classification.preprocess import Task, for_model
from eval.image_classification.training import Recipe, fit
from eval.measure import machine
from eval.tables import Table, show
from vltok.nn import attention_diversification_loss

CONDITIONS = ("clean", "noise")
DIGITS = {
    "data": "digits",
    "model": "vit_tiny_patch16_224",
    "model_kwargs": "img_size=32,patch_size=8,embed_dim=64,depth=4,num_heads=2",
    "arm": ["plain=", "tap-adl=tap,init=published+adl"],
}


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


def load(arm: Arm, spec: ModelSpec, seed: int, task: Task, classes: int, epochs: int) -> nn.Module:
    """The model of an arm with the weights it was trained to, or trained here where there are pictures to train on.

    Raises:
        ValueError: If there are neither.
    """
    if arm.start is not None:
        return spec.build(seed, classes, arm.methods, find_weights(arm.start, arm, seed))[0]
    if not task.count:
        raise ValueError(f'{arm.name} has no weights; write "{arm.name}@FILE=..." with the file it was trained to')
    model, handle = spec.build(seed, classes, arm.methods, None)
    model, found = fit(model, handle, task, Recipe(epochs=epochs, batch_size=32, lr=2e-3), seed, eval_every=10**9)
    print(f"{arm.name}: {100 * found['top1']:.1f} % of the test pictures are right after training", file=sys.stderr)
    return model


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    command = options.parser(__doc__, options.common("threads", "quick", quick="two epochs, 50 pictures"))
    command.add_argument("--data", type=Path, help="folder or npz file of pictures, as for eval.image_classification")
    command.add_argument("--model", help="a ViT of timm; needed with --data")
    command.add_argument("--model-kwargs", default="", help="for timm.create_model")
    command.add_argument("--arm", action="append", help="NAME@WEIGHTS=METHODS, repeated; needed with --data")
    command.add_argument("--epochs", type=options.count, default=6, help="of training on digits (%(default)s)")
    command.add_argument("--pictures", type=options.count, default=200, help="to average over (%(default)s)")
    command.add_argument("--shown", type=options.count, default=3, help="pictures to draw (%(default)s)")
    command.add_argument(
        "--noise", type=float, default=0.4, help="strength, in units of the model's input (%(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, help='what "{seed}" in file names stands for')
    where = Path("attention_maps.png")
    command.add_argument(
        "--out", type=Path, default=where, help="the figure; numbers go beside it as JSON (%(default)s)"
    )
    asked = options.parse(command, argv, {"epochs": 2, "pictures": 50})
    own = (asked.model, asked.arm)
    if (asked.data is None) != (own == (None, None)) or (asked.data is not None and None in own):
        command.error("--data, --model and --arm go together; without all three, digits are trained on")
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    asked = read(argv)
    train = None
    if asked.data is None:
        vars(asked).update(DIGITS)
        train = open_pictures("digits", "train")
    spec, source = ModelSpec(asked.model, parse_fields(asked.model_kwargs)), open_pictures(str(asked.data), "test")
    classes = count_classes(train, source)
    plain = spec.create(asked.seed, classes)
    task = Task(train, source, for_model(plain, spec.kwargs.get("in_chans")))
    test = next(task.test_batches(asked.pictures))[0]
    conditions = {"clean": test, "noise": with_noise(test, asked.noise)}
    maps, found = {}, []
    table = Table(("arm", "pictures", "most attended tenth", "diversification loss"), "where attention goes", left=2)
    for arm in map(parse_arm, asked.arm):
        net = load(arm, spec, asked.seed, task, classes, asked.epochs)
        for condition, batch in conditions.items():
            maps[arm.name, condition] = attention_of(net, batch)
            top, loss = concentration(maps[arm.name, condition])
            found.append({"arm": arm.name, "condition": condition, "top_tenth": top, "diversification": loss})
            table.add(arm.name, condition, f"{100 * top:.1f} %", f"{loss:.3f}")
    config = task.preprocess.config
    mean, std = (torch.tensor(values)[:, None, None] for values in (config["mean"], config["std"]))
    pixels = {condition: batch[: asked.shown] * std + mean for condition, batch in conditions.items()}
    draw(asked.out, pixels, maps, tuple(plain.patch_embed.grid_size))
    content = {"model": asked.model, "pictures": len(test), "noise": asked.noise, "concentration": found}
    show([table], machine("cpu"), asked.out.with_suffix(".json"), content)
    print(f"written to {asked.out} and {asked.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
