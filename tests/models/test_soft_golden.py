"""SOFT's backbones against the numbers of the released ones: logits, features, gradients, names and shapes."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from vltok.models import SoftTransformer

DATA = Path(__file__).parents[1] / "data"
RECIPE = json.loads((DATA / "soft_models.json").read_text())
SMALL = {"embed_dims": (16, 16, 24, 32), "num_heads": (2, 2, 3, 4), "depths": (1, 1, 1, 1), "num_classes": 10}
# Millions of parameters, published but for small; blocks of each stage; width of the third.
SIZES = {
    "tiny": (13, (1, 2, 3, 2), 320),
    "small": (38, (1, 3, 20, 4), 320),
    "medium": (45, (1, 3, 29, 5), 288),
    "large": (64, (1, 3, 40, 5), 320),
    "huge": (87, (1, 5, 49, 5), 352),
}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def draw(name: str, shape: list[int]) -> torch.Tensor:
    """A tensor of the recipe: numbers that depend on the seed, the name and the shape only."""
    noise, last = np.random.RandomState(zlib.crc32(f"{RECIPE['seed']}:{name}".encode())), name.split(".")[-1]
    if last == "num_batches_tracked":
        return torch.tensor(3)
    if last == "running_var":
        values = noise.uniform(0.5, 1.5, shape)
    else:
        values = noise.standard_normal(shape)
        if last == "running_mean":
            values *= 0.2
        elif last.startswith("pos_embed") or last == "cls_token":
            values *= 0.5
        elif len(shape) == 1 and last == "weight":
            values = 1 + 0.2 * values
        elif not name.startswith("input:"):
            values *= 0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
    return torch.from_numpy(values.astype(np.float32)) * (RECIPE["qnorm_scale"] if "Qnorm_act.0" in name else 1)


@pytest.fixture(scope="module")
def recipe() -> dict[str, torch.Tensor]:
    """Weights for soft_tiny and soft_norm_tiny, drawn anew."""
    return {name: draw(name, shape) for name, shape in RECIPE["state_dict"].items()}


def tiny(kind: str, weights: dict[str, torch.Tensor], **settings) -> SoftTransformer:
    with torch.device("meta"):
        model = timm.create_model(f"{kind}_tiny", **settings)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def count(model: torch.nn.Module) -> int:
    """Parameters in whole millions, as the papers' tables have them."""
    return int(sum(parameter.numel() for parameter in model.parameters()) / 1e6)


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("picture", ["a", "b"])
@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_a_small_model_answers_as_released_with_the_same_gradients(kind, picture):
    golden = load_file(DATA / f"soft_model_small_{kind}.safetensors")
    model = SoftTransformer(**SMALL, normalize=kind == "norm").eval()
    model.load_state_dict({name[3:]: value for name, value in golden.items() if name.startswith("sd.")}, strict=True)
    x = golden[f"in.{picture}"].requires_grad_()
    out = model(x)
    out.sum().backward()
    assert error(out, golden[f"out.{picture}"]) < 2e-5
    assert error(x.grad, golden[f"grad_sum.{picture}"]) < 5e-5


def test_the_recipe_gives_the_weights_that_the_numbers_were_made_with(recipe):
    weights = [value.double() for name, value in recipe.items() if "tracked" not in name]
    found = {
        "numel": sum(weight.numel() for weight in weights),
        "sum": sum(weight.sum().item() for weight in weights),
        "abs_sum": sum(weight.abs().sum().item() for weight in weights),
        "sq_sum": sum(weight.square().sum().item() for weight in weights),
    }
    assert found == pytest.approx(RECIPE["checksum"], rel=1e-9)


@pytest.mark.parametrize("kind", ["soft", "soft_norm"])
def test_tiny_models_answer_as_released_stage_by_stage(kind, recipe):
    golden = load_file(DATA / f"{kind}_tiny_recipe.safetensors")
    model = tiny(kind, recipe)
    with torch.no_grad():
        features, maps = model.forward_intermediates(draw("input:img", [2, 3, 224, 224]))
        logits = model.forward_head(features)
    for stage, stride in ((1, 196), (2, 28), (3, 28)):
        assert error(maps[stage - 1].flatten(2).mT[:, ::stride], golden[f"mid.stage{stage}"]) < 2e-5
    assert error(features[:, 0], golden["out.features"]) < 2e-5
    assert error(logits, golden["out.logits"]) < 2e-5


@pytest.mark.parametrize("kind", ["soft", "soft_norm"])
def test_the_sound_computation_is_another_one(kind, recipe):
    """Why parity is the default: the answers for released weights are as far apart as that."""
    golden = load_file(DATA / f"{kind}_tiny_recipe.safetensors")
    model = tiny(kind, recipe, parity=False)
    with torch.no_grad():
        logits = model(draw("input:img", [2, 3, 224, 224]))
    assert 1e-3 < error(logits, golden["out.logits"]) < 0.1


@pytest.mark.parametrize("parity", [True, False])
def test_only_the_released_norm_computation_depends_on_the_batch(parity, recipe):
    picture, other = torch.full((1, 3, 224, 224), 0.7), draw("input:img", [1, 3, 224, 224])
    for kind in ("soft", "soft_norm"):
        model = tiny(kind, recipe, parity=parity)
        with torch.no_grad():
            difference = error(model(torch.cat([picture, other]))[:1], model(picture))
        assert difference > 1e-4 if parity and kind == "soft_norm" else difference < 1e-5


@pytest.mark.parametrize("kind", ["soft", "soft_norm"])
def test_tiny_models_have_the_released_weights_in_the_released_order(kind):
    with torch.device("meta"):
        model = timm.create_model(f"{kind}_tiny")
    assert list(shapes(model).items()) == list(RECIPE["state_dict"].items())


@pytest.mark.parametrize("kind", ["soft", "soft_norm"])
@pytest.mark.parametrize("size", SIZES)
def test_models_have_the_published_size_and_the_weights_that_follow_from_tiny(kind, size):
    millions, depths, width = SIZES[size]
    with torch.device("meta"):
        model = timm.create_model(f"{kind}_{size}")
    resized = {320: width, 4 * 320: 4 * width, 320 // 32: width // 32}
    expected = {}
    for name, shape in RECIPE["state_dict"].items():
        if name.startswith(("block3", "patch_embed3", "pos_embed3")) or name == "patch_embed4.proj.0.weight":
            shape = [resized.get(side, side) for side in shape]
        if not name.startswith("block"):
            expected[name] = shape
            continue
        stage, block, rest = name.split(".", 2)
        if block == "0":
            expected |= {f"{stage}.{i}.{rest}": shape for i in range(depths[int(stage[-1]) - 1])}
    assert shapes(model) == expected
    assert count(model) == millions


@pytest.mark.parametrize("kind", ["soft", "soft_norm"])
def test_small_has_the_published_size_with_seven_blocks_in_its_third_stage(kind):
    with torch.device("meta"):
        assert count(timm.create_model(f"{kind}_small", depths=(1, 3, 7, 4))) == 24
