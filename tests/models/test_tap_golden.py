"""TAP's backbones against the numbers of the released ones: logits, attention maps, gradients, names and shapes."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import vltok.models  # noqa: F401
from vltok.models.tap_fan import TapFanBlock

DATA = Path(__file__).parents[1] / "data"
MODELS = json.loads((DATA / "tap_models.json").read_text())
NAMES = ["tap_fan_base_16_p4_hybrid", "tap_rvt_base_plus"]
EMBEDDINGS = ("cls_token", "att_mask")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def draw(seed: int, name: str, shape: list[int]) -> torch.Tensor:
    """A tensor of the recipe: numbers that depend on the seed, the name and the shape only."""
    noise, last = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())), name.split(".")[-1]
    if last == "num_batches_tracked":
        return torch.tensor(3)
    if last == "running_var":
        values = noise.uniform(0.5, 1.5, shape)
    else:
        values = noise.standard_normal(shape)
        if last == "running_mean":
            values *= 0.2
        elif last.startswith("gamma") or last == "temperature" or (len(shape) == 1 and last == "weight"):
            values = 1 + 0.2 * values
        elif last in EMBEDDINGS:
            values *= 0.5
        elif not name.startswith("input:"):
            values *= 0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
    scale = 2 if "dilation_predictor.proj.2" in name else 1
    return torch.from_numpy(values.astype(np.float32)) * scale


def weights(name: str) -> dict[str, torch.Tensor]:
    row = MODELS[name]
    return {key: draw(row["seed"], key, shape) for key, shape in row["state_dict"].items()}


def watch(attention: nn.Module, maps: list[torch.Tensor]) -> None:
    """Collect the head means of the probabilities that a token attention computes."""
    attention.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output.mean(1)))


def bare(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_the_released_weights_in_the_released_order(name):
    model = bare(name)
    found = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(found.items()) == list(MODELS[name]["state_dict"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == MODELS[name]["num_params"]


def test_norms_have_the_released_epsilons():
    """Which differ by less than the tolerances of the other tests can see."""
    for name in NAMES:
        for key, module in bare(name).named_modules():
            if isinstance(module, nn.LayerNorm):
                assert module.eps == (1e-5 if key.endswith("norm_v") else 1e-6), key
            elif isinstance(module, nn.BatchNorm2d):
                assert (module.eps, module.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_answers_as_released_and_shows_the_released_attention(name):
    golden, released, model, maps = load_file(DATA / f"{name}.safetensors"), weights(name), bare(name), []
    checked = [value.double() for key, value in released.items() if "tracked" not in key]
    found = {
        "numel": sum(value.numel() for value in checked),
        "sum": sum(value.sum().item() for value in checked),
        "abs_sum": sum(value.abs().sum().item() for value in checked),
        "sq_sum": sum(value.square().sum().item() for value in checked),
    }
    assert found == pytest.approx(MODELS[name]["checksum"], rel=1e-9)

    model.load_state_dict(released, strict=True, assign=True)
    model.eval()
    attentions = model.token_attentions()
    for each in (attentions[0], attentions[-1]):
        watch(each, maps)
    weighings = []
    for each in model.blocks:
        each.dilation_predictor.register_forward_hook(lambda module, args, output: weighings.append((module, args)))
    with torch.no_grad():
        logits = model(draw(MODELS[name]["seed"], "input:img", [2, 3, 224, 224]))
        means = [
            module.scale_weights(tokens.unflatten(1, grid)).mean((0, 1, 2)) for module, (tokens, grid) in weighings
        ]
    assert error(logits, golden["out.logits"]) < 5e-6
    for found, place in zip(maps, ("first", "last"), strict=True):
        assert error(found[:, ::7, ::7], golden[f"mid.attn_{place}_layer_head_mean_strided"]) < 1e-5
    assert error(torch.stack(means), golden["mid.weights_map_mean_per_block"]) < 1e-5


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_block_of_fan_computes_and_learns_as_released(mode):
    golden, maps = load_file(DATA / "tap_fan_block.safetensors"), []
    block = TapFanBlock(32, 2, num_scales=3, eps=1e-5).train(mode == "train")
    block.load_state_dict(weights("tap_fan_block"), strict=True)
    watch(block.attn, maps)
    x = golden["in.x"].requires_grad_()
    out = block(x, (7, 7)).mT.unflatten(2, (7, 7))
    (out * golden["in.cot_block"]).sum().backward()
    assert error(out, golden[f"{mode}.block_out"]) < 2e-6
    assert error(x.grad, golden[f"{mode}.block_grad_cot.x"]) < 1e-5
    if mode == "eval":
        assert error(maps[0][:, ::5, ::5], golden["eval.attn_head_mean_strided"]) < 1e-5
