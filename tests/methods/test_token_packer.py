"""TokenPacker, the method: which levels it reads, and where training starts."""

from __future__ import annotations

import pytest
import torch
from tiny import LLAVA, LLAVA_SIGLIP, picture, shared_model
from torch import nn
from torch.nn import functional as F

import vltok
from vltok.errors import UnsupportedModelError
from vltok.methods.condensing.token_packer.method import start_from_pooling
from vltok.nn import TokenPackerProjector
from vltok.views import ProjectorSite

WORDS = "w1 <image> w2 w3"


def site(depth: int, level: int) -> ProjectorSite:
    return ProjectorSite(nn.Identity(), None, (24, 24), 1024, 4096, depth, (level,))


@pytest.mark.parametrize(
    ("depth", "level", "expected"),
    [(24, 23, (12, 16, 22, 23)), (27, 26, (14, 18, 25, 26)), (12, 11, (6, 8, 11)), (5, 4, (2, 3, 4)), (3, 2, (1, 2))],
)
def test_levels_stand_at_the_published_relative_depths(depth, level, expected):
    assert vltok.TokenPacker()._levels_of(site(depth, level)) == expected


def test_levels_of_your_own_are_taken_and_checked():
    assert vltok.TokenPacker(levels=[0, 24])._levels_of(site(24, 23)) == (0, 24)
    with pytest.raises(ValueError, match=r"levels must be in 0\.\.24, .* got \(3, 25\)"):
        vltok.TokenPacker(levels=(3, 25))._levels_of(site(24, 23))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scale_factor": 0}, ValueError, "scale_factor must be at least 1, got 0"),
        ({"scale_factor": 2.0}, TypeError, r"scale_factor must be an integer of at least 1, got 2\.0"),
        ({"scale_factor": None}, TypeError, "scale_factor must be an integer"),
        ({"embed_dim": True}, TypeError, "embed_dim must be an integer"),
        ({"num_heads": -1}, ValueError, "num_heads must be at least 1, got -1"),
        ({"init": "zeros"}, ValueError, "init must be one of 'random', 'pool', got 'zeros'"),
        ({"levels": ()}, ValueError, r"ascending order, got \(\)"),
        ({"levels": (3, 2)}, ValueError, r"ascending order, got \(3, 2\)"),
        ({"levels": (2, 2)}, ValueError, r"different hidden states"),
        ({"levels": (1.5,)}, TypeError, r"levels must be integers, got \(1\.5,\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        vltok.TokenPacker(**settings)


def pooled(model: nn.Module, family, pixels: torch.Tensor, scale: int) -> torch.Tensor:
    """Average pooling of the patches of the level before last, then the model's own projector."""
    level = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    patches = level[:, 1:] if family.has_cls else level
    image = F.avg_pool2d(patches.float().mT.unflatten(-1, (4, 4)), scale).flatten(2).mT
    return model.model.multi_modal_projector(image.to(level.dtype))


@torch.no_grad()
@pytest.mark.parametrize("family", [LLAVA, LLAVA_SIGLIP], ids=["cls", "no cls"])
@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_pool_starts_as_average_pooling_and_the_models_own_projector(family, scale, dtype, tolerance):
    model = family.model(dtype=dtype)
    pixels = family.inputs([WORDS], [picture(0)])["pixel_values"].to(dtype)
    expected = pooled(model, family, pixels, scale).float()
    with vltok.apply(model, vltok.TokenPacker(scale, init="pool"), processor=family.processor()):
        found = model.get_image_features(pixels).pooler_output[0].float()
    assert (found - expected[0]).abs().max() <= tolerance * expected.abs().max()


def test_pool_equals_pooling_also_for_features_far_from_unit_size():
    torch.manual_seed(0)
    first, second = nn.Linear(64, 96), nn.Linear(96, 96)
    projector = TokenPackerProjector(4, 64, 96, 2, embed_dim=128, num_heads=2)
    start_from_pooling(projector, first, second)
    for size in (1e-3, 1.0, 30.0):
        x = torch.randn(2, 16, 256) * size
        mean = F.avg_pool2d(x[..., -64:].mT.unflatten(-1, (4, 4)), 2).flatten(2).mT
        expected = second(F.gelu(first(mean)))
        torch.testing.assert_close(projector(x), expected, rtol=0, atol=2e-3 * expected.abs().max().item())


def test_every_weight_learns_from_the_pool_start():
    torch.manual_seed(0)
    projector = TokenPackerProjector(4, 16, 24, 2, embed_dim=32, num_heads=2)
    start_from_pooling(projector, nn.Linear(16, 24), nn.Linear(24, 24))
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        projector(torch.randn(4, 16, 64)).square().mean().backward()
        optimizer.step()
    still = [name for name, value in projector.state_dict().items() if torch.equal(value, before[name])]
    assert still == []


def test_pool_needs_room_and_a_projector_it_can_continue():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    with pytest.raises(ValueError, match=r"needs embed_dim of at least 64, twice .* got 63"):
        vltok.apply(model, vltok.TokenPacker(init="pool", embed_dim=63), processor=processor)
    with pytest.raises(UnsupportedModelError, match=r'the last of levels=\(0, 1\).* reads \(2,\); use init="random"'):
        vltok.apply(model, vltok.TokenPacker(init="pool", levels=(0, 1)), processor=processor)
    other = LLAVA.model()
    other.config.projector_hidden_act = "relu"
    with pytest.raises(UnsupportedModelError, match="is built otherwise"):
        vltok.apply(other, vltok.TokenPacker(init="pool"), processor=processor)
    assert processor.patch_size == 14


def test_widths_and_heads_follow_the_tower():
    model = shared_model(LLAVA)
    with vltok.apply(model, vltok.TokenPacker(), processor=LLAVA.processor()) as handle:
        projector = handle.added_modules[0]
        assert (projector.q_proj_1.out_features, projector.clip_attn.num_heads, projector.num_levels) == (32, 1, 2)
    with vltok.apply(model, vltok.TokenPacker(embed_dim=384), processor=LLAVA.processor()) as handle:
        assert handle.added_modules[0].clip_attn.num_heads == 3
    with vltok.apply(model, vltok.TokenPacker(embed_dim=500), processor=LLAVA.processor()) as handle:
        assert handle.added_modules[0].clip_attn.num_heads == 2, "3 does not divide 500"
    with pytest.raises(ValueError, match="embed_dim must be divisible by num_heads, got 32 and 5"):
        vltok.apply(model, vltok.TokenPacker(num_heads=5), processor=LLAVA.processor())
