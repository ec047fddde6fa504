"""TAP's backbones as timm models: creation by name, weights from files, features, other pictures, training."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch
from tap_backbones import FAN, NAMES, RVT, SMALL, make, pictures
from timm.models import get_pretrained_cfg
from torch import nn
from torch.nn import functional as F

from vltok.models.tap_rvt import ScaledAttention, checkpoint_filter_fn, resize_mask

LEVELS = {FAN: [(8, 4), (16, 8), (24, 16), (24, 16)], RVT: [(24, 16)] * 3}  # channels and stride of features


# By name


def test_their_names_are_registered():
    assert timm.list_models("tap_*") == NAMES


@pytest.mark.parametrize(("name", "crop"), [(FAN, 1.0), (RVT, 0.875)])
def test_a_name_has_a_configuration_without_anything_to_download(name, crop):
    config = get_pretrained_cfg(name)
    assert not config.has_weights
    assert (config.mean, config.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (config.crop_pct, config.interpolation) == (crop, "bicubic")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model.get_submodule(config.first_conv), nn.Conv2d)
    assert model.get_submodule(config.classifier) is model.get_classifier()
    assert config.min_input_size == (3, model.min_size, model.min_size)
    assert {block.dilation_predictor.num_scales for block in model.blocks} == {4}


# Weights from files


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory) -> tuple[str, Path]:
    """Weights of a small model under the released names, as the released training code saves them."""
    path = tmp_path_factory.mktemp("released") / f"{request.param}.pth.tar"
    weights = make(request.param).state_dict()
    saved = {
        "epoch": 299,
        "arch": request.param,
        "state_dict": {f"module.{name}": value for name, value in weights.items()},
        "state_dict_ema": {name: value + 1 for name, value in weights.items()},
        "optimizer": {"state": {}},
        "args": argparse.Namespace(lr=1e-3),
        "version": 2,
    }
    torch.save(saved, path)
    return request.param, path


def holds(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in found.items())


def test_a_released_checkpoint_loads_strictly(checkpoint, tmp_path):
    name, path = checkpoint
    weights = make(name).state_dict()
    torch.save({"model": weights}, tmp_path / "model.pth")
    torch.save(weights, tmp_path / "bare.pth")
    for file in ("model.pth", "bare.pth"):
        assert holds(timm.create_model(name, checkpoint_path=tmp_path / file, **SMALL[name]), weights)
    averaged = {key: value + 1 for key, value in weights.items()}
    by_file = {"file": str(path), "num_classes": 10}
    assert holds(timm.create_model(name, checkpoint_path=path, **SMALL[name]), averaged)
    assert holds(
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=by_file, **SMALL[name]),
        averaged,
    )
    for other in (timm.models.load_state_dict(path, use_ema=False), {"state_dict": weights}):
        overlay = {"state_dict": other, "num_classes": 10}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL[name])
        assert holds(model, weights)
    del weights["norm.bias"]
    torch.save(weights, tmp_path / "bare.pth")
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.bias"):
        timm.create_model(name, checkpoint_path=tmp_path / "bare.pth", **SMALL[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_fits_other_channels_classes_and_outputs(name, tmp_path):
    released = make(name)
    torch.save(released.state_dict(), tmp_path / "bare.pth")
    settings = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "bare.pth"), "num_classes": 10}}
    grey = timm.create_model(name, **settings, **SMALL[name] | {"in_chans": 1, "num_classes": 3}).eval()
    conv = f"{get_pretrained_cfg(name).first_conv}.weight"
    torch.testing.assert_close(grey.state_dict()[conv], released.state_dict()[conv].sum(1, keepdim=True))
    assert grey(pictures(chans=1)).shape == (2, 3)
    features = timm.create_model(name, **settings, **SMALL[name], features_only=True).eval()
    taken = [0, 1, -2, -1] if name == FAN else [0, 1, 2]
    for found, expected in zip(features(pictures()), released.forward_intermediates(pictures(), taken)[1], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_checkpoint_of_rvt_fits_pictures_of_another_size(tmp_path):
    released = make(RVT)
    torch.save(released.state_dict(), tmp_path / "bare.pth")
    overlay = {"file": str(tmp_path / "bare.pth"), "num_classes": 10}
    settings = SMALL[RVT] | {"img_size": (96, 48)}
    resized = timm.create_model(RVT, pretrained=True, pretrained_cfg_overlay=overlay, **settings).eval()
    assert resized.blocks[0].attn.att_mask.shape == (4, 18, 18)
    torch.testing.assert_close(resized(pictures(2, 96, 48)), released(pictures(2, 96, 48)))
    assert make(RVT, img_size=79).blocks[0].attn.att_mask.shape == (4, 25, 25)  # 79 pixels make 5 tokens
    weights = make(RVT, img_size=(64, 96)).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for .*att_mask"):
        released.load_state_dict(checkpoint_filter_fn(weights, released))


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_without_a_file_says_what_to_pass(name):
    for extra in ({}, {"pretrained_cfg_overlay": {"crop_pct": 0.9}}):
        with pytest.raises(ValueError, match=rf"{name}.*pretrained_cfg_overlay=\{{\"file\": PATH\}}.*checkpoint_path"):
            timm.create_model(name, pretrained=True, **extra)


# Features


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (16, 16), (79, 130)])
def test_features_are_maps_with_sides_rounded_down(name, size):
    model = make(name, features_only=True)
    maps = model(pictures(2, *size))
    assert list(zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)) == LEVELS[name]
    for found, (chans, stride) in zip(maps, LEVELS[name], strict=True):
        height, width = (side + (name == RVT) for side in size)  # RVT's convolutions lack one pixel at most
        assert found.shape == (2, chans, height // stride, width // stride)
        assert found.isfinite().all()


def test_features_of_rvt_are_spread_over_its_blocks():
    with torch.device("meta"):
        model = timm.create_model(RVT, features_only=True)
    assert model.out_indices == [2, 5, 8, 11]


@pytest.mark.parametrize(
    ("name", "indices", "left"),
    [
        (FAN, [0], {"patch_embed"}),
        (FAN, [1, -4], {"patch_embed", "pos_embed", "blocks"}),
        (RVT, [0], {"patch_embed", "transformers"}),
    ],
)
def test_features_of_early_levels_come_without_the_later_ones(name, indices, left):
    whole, early = make(name), make(name, features_only=True, out_indices=indices)
    for found, expected in zip(early(pictures()), whole.forward_intermediates(pictures(), indices)[1], strict=True):
        torch.testing.assert_close(found, expected)
    assert {key.split(".")[1] for key in early.state_dict()} == left
    assert len(early.model.blocks) == (0 if indices == [0] and name == FAN else 1)
    assert early.model.no_weight_decay() <= dict(early.model.named_parameters()).keys()
    last = early.feature_info.channels()[-1]
    assert early.model(pictures()).shape[::2] == (2, last)
    assert early.model.get_classifier()(torch.zeros(1, last)).shape == (1, last)


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_agree_with_features_and_stop_early(name):
    model = make(name)
    features = model.forward_features(pictures())
    final, maps = model.forward_intermediates(pictures(), 2, norm=True)
    assert torch.equal(final, features)
    raw = model.forward_intermediates(pictures(), [-1], intermediates_only=True)[0]
    torch.testing.assert_close(model.norm(raw.permute(0, 2, 3, 1)), maps[1].permute(0, 2, 3, 1))
    assert len(model.forward_intermediates(pictures(), norm=True)[1]) == len(model.feature_info)
    tokens = features[:, 1:] if name == FAN else features
    torch.testing.assert_close(tokens, (maps[1] if name == FAN else raw).flatten(2).mT)
    calls = []
    model.blocks[1].register_forward_hook(lambda *args: calls.append(args))
    level = 2 if name == FAN else 0
    last, maps = model.forward_intermediates(pictures(), [level], stop_early=True)
    assert torch.equal(last.mT.unflatten(2, (4, 4)), maps[0])
    assert calls == []


@pytest.mark.parametrize("name", NAMES)
def test_what_the_classifier_sees_is_chosen_by_the_pool(name):
    model = make(name)
    features = model.forward_features(pictures())
    if name == FAN:
        pools = {"token": features[:, 0], "avg": features[:, 1:].mean(1), "": features}
    else:
        pools = {"avg": model.norm(features.mean(1)), "": model.norm(features)}
    for pool, expected in pools.items():
        model.reset_classifier(3, pool)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
        torch.testing.assert_close(model(pictures()), model.get_classifier()(expected))
        assert model(pictures()).shape[-1] == model.num_classes == 3
    assert make(name, num_classes=0)(pictures()).shape == (2, 24)


# Pictures of any size


def test_scales_of_attention_are_resized_over_queries_and_keys():
    mask = torch.randn(3, 6, 6)
    onto = F.interpolate(torch.eye(6).unflatten(1, (2, 3))[None], (4, 2), mode="bilinear").flatten(2)[0].mT  # (8, 6)
    torch.testing.assert_close(resize_mask(mask, (2, 3), (4, 2)), onto @ mask @ onto.mT)
    assert resize_mask(mask, (2, 3), (2, 3)) is mask
    attention = ScaledAttention(8, 2, (2, 3))
    nn.init.constant_(attention.att_mask, 0.3)
    x = torch.randn(1, 8, 8)
    plain = ScaledAttention(8, 2)
    plain.load_state_dict({name: value for name, value in attention.state_dict().items() if name != "att_mask"})
    plain.scale = attention.scale * torch.tensor(0.3).sigmoid()
    torch.testing.assert_close(attention(x, (4, 2)), plain(x, (4, 2)))


@pytest.mark.parametrize(("name", "smallest"), [(FAN, 16), (RVT, 15)])
def test_pictures_that_are_too_small_are_refused_with_the_smallest_size(name, smallest):
    model = make(name)
    assert model.min_size == smallest
    assert model(pictures(1, smallest, smallest)).isfinite().all()
    with pytest.raises(ValueError, match=rf"pictures of 64 x {smallest - 1} pixels.*at least {smallest} pixels"):
        model(pictures(1, 64, smallest - 1))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (FAN, {"depth": 0}, "depth must be at least 1, got 0"),
        (RVT, {"num_scales": 0}, "num_scales must be at least 1, got 0"),
        (RVT, {"num_heads": 5}, "num_heads must divide embed_dim, got 5 and 24"),
        (FAN, {"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        (FAN, {"conv_dims": (8, 16, 32)}, r"conv_dims must be 2 numbers of at least 1, got \(8, 16, 32\)"),
        (FAN, {"conv_depths": (0, 1)}, "conv_depths must be 2 numbers"),
        (FAN, {"global_pool": "max"}, "global_pool must be one of"),
        (RVT, {"global_pool": "token"}, "global_pool must be one of 'avg', '', got 'token'"),
        (RVT, {"img_size": (64, 14)}, "img_size of 64 x 14 pixels are too small: make each side at least 15 pixels"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **(SMALL[name] | settings))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(pictures(chans=1)), r"pictures must be \(B, 3, H, W\), got \(2, 1, 64, 64\)"),
        (lambda model: model(pictures()[0]), r"got \(3, 64, 64\)"),
        (lambda model: model.forward_intermediates(pictures(), [6]), r"levels must be in 0\.\.5.*got \[6\]"),
        (lambda model: model.forward_intermediates(pictures(), 7), r"levels must be in 0\.\.5"),
        (lambda model: model.forward_intermediates(pictures(), output_fmt="NLC"), 'output_fmt must be "NCHW"'),
        (lambda model: model.reset_classifier(3, "max"), "global_pool must be one of"),
    ],
)
def test_calls_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(FAN))
