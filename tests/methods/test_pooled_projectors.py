"""AveragePool and PixelShuffle: against loops over regions, and as a continuation of a model's own projector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import INTERNVL, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, LLAVA_SIGLIP, picture, shared_model
from torch import nn
from torch.nn import functional as F
from unchanged import unchanged
from zoo import tiles

import vltok
from vltok.errors import UnsupportedModelError
from vltok.methods.condensing.average_pool import AveragePoolProjector, average_regions
from vltok.methods.condensing.pixel_shuffle import PixelShuffleProjector, stack_regions

KIN = {row.key: row for row in tiles.ROWS}
METHODS = [vltok.AveragePool, vltok.PixelShuffle]
sides = st.integers(1, 4)


def regions(rows: int, columns: int, scale: int) -> list[list[int]]:
    """Which patches each region has, region by region."""
    return [
        [(top + i) * columns + left + j for i in range(scale) for j in range(scale)]
        for top in range(0, rows, scale)
        for left in range(0, columns, scale)
    ]


def mean_of(x: torch.Tensor, own: list[int]) -> torch.Tensor:
    total = torch.zeros_like(x[:, 0])
    for patch in own:
        total = total + x[:, patch]
    return total / len(own)


@settings(max_examples=60, deadline=None)
@given(rows=sides, columns=sides, scale=sides, batch=sides)
def test_regions_are_averaged_and_stacked_as_by_hand(rows, columns, scale, batch):
    rows, columns = rows * scale, columns * scale
    x = torch.randn(batch, rows * columns, 5) * 10
    means, stacked = average_regions(x, columns, scale), stack_regions(x, columns, scale)
    assert means.shape == (batch, rows * columns // scale**2, 5)
    for number, own in enumerate(regions(rows, columns, scale)):
        torch.testing.assert_close(means[:, number], mean_of(x, own), rtol=1e-5, atol=1e-5)
        assert torch.equal(stacked[:, number], torch.cat([x[:, patch] for patch in own], dim=1))


@torch.no_grad()
def test_a_row_of_a_batch_equals_the_row_alone():
    x = torch.randn(4, 36, 8)
    for projector in (AveragePoolProjector(6, 8, 12, 16, 3), PixelShuffleProjector(6, 8, 12, 16, 3)):
        both = projector(x)
        assert all(torch.equal(both[i : i + 1], projector(x[i : i + 1].clone())) for i in range(4))


def test_regions_of_one_patch_and_of_all_patches():
    x = torch.randn(2, 16, 3)
    assert torch.equal(average_regions(x, 4, 1), x) and torch.equal(stack_regions(x, 4, 1), x)
    torch.testing.assert_close(average_regions(x, 4, 4), x.mean(1, keepdim=True))
    assert torch.equal(stack_regions(x, 4, 4)[:, 0], x.flatten(1))


def features_of(model: nn.Module, family, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What the model's own projector is given."""
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.get_image_features(pixels)
    hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("family", [LLAVA, LLAVA_SIGLIP], ids=["cls", "no cls"])
@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("levels", [-2, [1, -1]], ids=["a level", "two levels"])
@pytest.mark.parametrize("bias", [True, False])
def test_both_start_as_the_mean_of_regions_through_the_models_own_projector(family, scale, levels, bias):
    model = family.model()
    model.config.vision_feature_layer = levels
    old = model.model.multi_modal_projector
    if not isinstance(levels, int):
        old.linear_1 = nn.Linear(64, old.linear_1.out_features)
    if not bias:
        old.linear_1.bias = old.linear_2.bias = None
    pixels = family.inputs(["<image>"], [picture(0)])["pixel_values"]
    (x,) = features_of(model, family, pixels)
    expected = torch.stack([old(mean_of(x, own)) for own in regions(4, 4, scale)], dim=1)
    found = []
    for method in METHODS:
        with vltok.apply(model, method(scale), processor=family.processor()):
            found.append(torch.stack(model.get_image_features(pixels).pooler_output))
    size = expected.abs().max()
    assert (found[0] - expected).abs().max() <= 1e-6 * size
    assert (found[1] - found[0]).abs().max() <= 1e-6 * size


@torch.no_grad()
@pytest.mark.parametrize("family", [LLAVA_NEXT, LLAVA_ONEVISION, KIN["llava_next_video-cls"]], ids=lambda row: row.key)
def test_both_start_alike_on_pictures_in_crops(family):
    model, scale, answers = shared_model(family), family.packer_scale, []
    for method in METHODS:
        processor = family.processor()
        with vltok.apply(model, method(scale), processor=processor) as handle:
            inputs = family.inputs(["w1 <image> w2"], [picture(0, family.size)], processor=processor)
            answers.append(model(**inputs).logits)
            report = handle.report(file=None).condensed
            assert report.tokens * scale**2 == report.patches
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-4 * answers[0].abs().max().item())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_half_precision_stays_near_float32(method, dtype, tolerance):
    model, processor = LLAVA.model(), LLAVA.processor()
    pixels = LLAVA.inputs(["<image>"], [picture(0)])["pixel_values"]
    with torch.no_grad(), vltok.apply(model, method(2), processor=processor) as handle:
        (x,) = features_of(model, LLAVA, pixels)
        projector = handle.added_modules[0]
        expected = projector(x)
        found = projector.to(dtype)(x.to(dtype)).float()
        projector.float()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", [AveragePoolProjector, PixelShuffleProjector])
def test_gradients_are_those_of_the_loop_and_reach_every_weight(kind):
    torch.manual_seed(0)
    projector = kind((4, 6), 5, 7, 9, 2).double()
    x = torch.randn(3, 24, 5).double().requires_grad_()
    first, _, second = projector.mlp
    found = torch.autograd.grad(projector(x).square().sum(), [x, *projector.parameters()])
    rows = []
    for own in regions(4, 6, 2):
        row = mean_of(x, own) if kind is AveragePoolProjector else torch.cat([x[:, patch] for patch in own], dim=1)
        rows.append(F.linear(F.gelu(F.linear(row, first.weight, first.bias)), second.weight, second.bias))
    expected = torch.autograd.grad(torch.stack(rows, 1).square().sum(), [x, *projector.parameters()])
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_the_models_own_projector_alone(method):
    model = LLAVA.model()
    with unchanged(model):
        handle = vltok.apply(model, method(2), processor=LLAVA.processor())
        with torch.no_grad():
            for parameter in handle.added_modules[0].parameters():
                parameter.add_(1)
        handle.remove()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [INTERNVL, KIN["vipllava-cls"]], ids=lambda row: row.key)
def test_a_projector_that_is_built_otherwise_is_not_continued(method, family):
    model, processor = shared_model(family), family.processor()
    refused = pytest.raises(UnsupportedModelError, match=r'is built otherwise; use TokenPacker with init="random"')
    with unchanged(model), refused:
        vltok.apply(model, method(family.packer_scale), processor=processor)
    assert processor.to_dict() == family.processor().to_dict()


@pytest.mark.parametrize("first", [*METHODS, vltok.TokenPacker])
@pytest.mark.parametrize("second", [*METHODS, vltok.TokenPacker])
def test_condensed_tokens_are_not_condensed_again(first, second):
    model, processor = shared_model(LLAVA), LLAVA.processor()
    refused = pytest.raises(ValueError, match=rf"already condensed by a {first.__name__}Projector")
    with vltok.apply(model, first(2), processor=processor), unchanged(model), refused:
        vltok.apply(model, second(2), processor=processor)


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_fit_is_refused(method):
    model, processor = shared_model(LLAVA), LLAVA.processor()
    with unchanged(model), pytest.raises(ValueError, match=r"scale_factor=3 doesn't divide the grid .* do: 2, 4"):
        vltok.apply(model, method(3), processor=processor)
    with pytest.raises(ValueError, match="scale_factor must be at least 1, got 0"):
        method(0)
    with pytest.raises(TypeError, match=r"scale_factor must be an integer of at least 1, got 2\.0"):
        method(2.0)
    with vltok.apply(model, method(2), processor=processor) as handle:
        for shape in ((2, 17, 32), (2, 16, 31), (16, 32)):
            with pytest.raises(ValueError, match=r"features must be \(B, 16, 32\): the patches of a 4 x 4 grid"):
                handle.added_modules[0](torch.zeros(shape))


def test_pixel_shuffle_takes_one_scale_factor():
    for wrong in ((2, 4), (2,), [2]):
        with pytest.raises(TypeError, match="scale_factor must be an integer of at least 1"):
            vltok.PixelShuffle(wrong)
        with pytest.raises(TypeError, match="scale_factor must be an integer of at least 1"):
            PixelShuffleProjector(4, 5, 6, 7, wrong)


@pytest.mark.parametrize("method", METHODS)
def test_the_text_form_makes_the_method(method):
    assert vltok.Method.from_text(f"{method.name},scale_factor=4") == method(4)
