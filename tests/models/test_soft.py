"""SOFT's backbones as timm models: creation by name, weights from files, features, other pictures, training."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import vltok.models.soft
from vltok.models import SoftTransformer

NAMES = [f"{kind}_{size}" for kind in ("soft", "soft_norm") for size in ("tiny", "small", "medium", "large", "huge")]
SMALL = {"embed_dims": (16, 16, 24, 32), "num_heads": (2, 2, 3, 4), "depths": (1, 1, 2, 1), "num_classes": 10}
SMALL |= {"img_size": 64}


def sharpen(model: nn.Module) -> nn.Module:
    """Weights with which every part counts: kernels neither vanish nor are flat, norms and biases do something."""
    for name, parameter in model.named_parameters():
        seed = zlib.crc32(name.removeprefix("model.").encode())  # the same weights whatever else the model has
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        if parameter.dim() == 3:
            value = 0.5 * noise
        elif parameter.dim() == 1:
            value = (1 if name.endswith("weight") else 0) + 0.1 * noise
            value = 0.7 * value if "Qnorm_act" in name else value
        else:
            value = noise * parameter[0].numel() ** -0.5
        parameter.data.copy_(value)
    return model


def make(name: str = "soft_norm_tiny", **changes) -> nn.Module:
    """A small model by name, sharpened, in evaluation mode; its batch norms have seen data."""
    model = sharpen(timm.create_model(name, **(SMALL | changes)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
            module.running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return model.eval()


def pictures(batch: int = 2, height: int = 64, width: int = 64, chans: int = 3) -> torch.Tensor:
    return torch.randn(batch, chans, height, width, generator=torch.Generator().manual_seed(3))


# By name


def test_importing_the_models_registers_all_names_and_importing_vltok_none():
    code = (
        "import vltok, timm; print(timm.list_models('soft_*')); import vltok.models; print(*timm.list_models('soft_*'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = run.stdout.splitlines()
    assert before == "[]"
    assert set(after.split()) == set(NAMES)
    assert run.stderr == ""  # timm warns of a name that is taken


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_a_configuration_without_anything_to_download(name):
    config = get_pretrained_cfg(name)
    assert not config.has_weights
    assert (config.mean, config.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model.get_submodule(config.first_conv), nn.Conv2d)
    assert model.get_submodule(config.classifier) is model.get_classifier()
    assert config.min_input_size == (3, model.min_size, model.min_size)
    assert {block.att.mha.attn.normalize for block in model.block3} == {name.startswith("soft_norm")}
    assert {block.att.mha.attn.parity for block in model.block1} == {True}


# Weights from files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Weights of a small model under the released names, as the released training code saves them."""
    path = tmp_path_factory.mktemp("released") / "soft.pth"
    torch.save({"model": make(img_size=224).state_dict(), "optimizer": {"state": {}}, "epoch": 299}, path)
    return path


def test_a_released_checkpoint_loads_strictly(checkpoint, tmp_path):
    weights = torch.load(checkpoint, weights_only=True)["model"]
    torch.save(weights, tmp_path / "bare.pth")
    for path in (checkpoint, tmp_path / "bare.pth"):
        by_path = timm.create_model("soft_norm_tiny", checkpoint_path=path, **SMALL | {"img_size": 224})
        by_file = timm.create_model(
            "soft_norm_tiny",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(path), "num_classes": 10},
            **SMALL | {"img_size": 224},
        )
        for model in (by_path, by_file):
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    del weights["block3.1.att.ff1.bias"]
    torch.save(weights, tmp_path / "bare.pth")
    with pytest.raises(RuntimeError, match=r"Missing key.*block3\.1\.att\.ff1\.bias"):
        timm.create_model("soft_norm_tiny", checkpoint_path=tmp_path / "bare.pth", **SMALL | {"img_size": 224})


def test_a_checkpoint_fits_other_pictures_channels_classes_and_outputs(checkpoint):
    settings = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(checkpoint), "num_classes": 10}}
    released = make(img_size=224)
    resized = timm.create_model("soft_norm_tiny", **settings, **SMALL).eval()
    assert resized.pos_embed4.shape == (1, 5, 32)
    torch.testing.assert_close(resized(pictures()), released(pictures()))

    grey = timm.create_model("soft_norm_tiny", **settings, **SMALL | {"in_chans": 1, "num_classes": 3}).eval()
    first = released.state_dict()["patch_embed1.proj.0.weight"]
    torch.testing.assert_close(grey.state_dict()["patch_embed1.proj.0.weight"], first.sum(1, keepdim=True))
    assert grey(pictures(chans=1)).shape == (2, 3)

    maps = timm.create_model("soft_norm_tiny", **settings, **SMALL, features_only=True).eval()(pictures())
    for found, expected in zip(maps, released.forward_intermediates(pictures(), intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected)


def test_embeddings_of_pictures_that_are_not_square_are_left_to_the_strict_check():
    weights = make(img_size=(64, 96)).state_dict()
    filtered = vltok.models.soft.checkpoint_filter_fn(weights, make())
    assert all(filtered[name] is value for name, value in weights.items())
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed1"):
        make().load_state_dict(filtered)


def test_pretrained_without_a_file_says_what_to_pass():
    for extra in ({}, {"pretrained_cfg_overlay": {"crop_pct": 0.9}}):
        with pytest.raises(ValueError, match=r"soft_huge.*pretrained_cfg_overlay=\{\"file\": PATH\}.*checkpoint_path"):
            timm.create_model("soft_huge", pretrained=True, **extra)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": make().state_dict(), "extra": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RuntimeError, match="weights_only"):
        timm.create_model("soft_norm_tiny", checkpoint_path=tmp_path / "evil.pth", **SMALL)
    assert not (tmp_path / "ran").exists()


# Features


@pytest.mark.parametrize("size", [(64, 64), (29, 29), (75, 130)])
def test_features_are_four_maps_of_strides_4_to_32_rounded_up(size):
    model = make(features_only=True)
    maps = model(pictures(2, *size))
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    for found, chans, stride in zip(maps, SMALL["embed_dims"], (4, 8, 16, 32), strict=True):
        assert found.shape == (2, chans, -(-size[0] // stride), -(-size[1] // stride))
        assert found.isfinite().all()


def test_features_of_early_stages_come_without_the_later_ones():
    whole, early = make(), make(features_only=True, out_indices=(0, -3))
    for found, expected in zip(early(pictures()), whole.forward_intermediates(pictures(), [0, 1])[1], strict=True):
        torch.testing.assert_close(found, expected)
    assert early.feature_info.channels() == [16, 16]
    assert {name.split(".")[1] for name in early.state_dict()} == {
        f"{part}{stage}" for part in ("patch_embed", "pos_embed", "block") for stage in (1, 2)
    }
    early.model.prune_intermediate_layers([0])
    assert early.model.no_weight_decay() == {"pos_embed1"}
    assert early.model(pictures()).shape == (2, 256, 16)


def test_intermediates_agree_with_features_and_stop_early():
    model = make()
    features = model.forward_features(pictures())
    assert features.shape == (2, 1 + 4, 32)
    final, maps = model.forward_intermediates(pictures(), 2, norm=True)
    torch.testing.assert_close(final, features)
    torch.testing.assert_close(maps[1].flatten(2).mT, features[:, 1:])
    raw = model.forward_intermediates(pictures(), [-1], intermediates_only=True)[0]
    torch.testing.assert_close(model.norm(raw.permute(0, 2, 3, 1)), maps[1].permute(0, 2, 3, 1))
    calls = []
    model.patch_embed3.register_forward_hook(lambda *args: calls.append(args))
    last, maps = model.forward_intermediates(pictures(), [1], stop_early=True)
    torch.testing.assert_close(last.mT.unflatten(2, (8, 8)), maps[0])
    assert calls == []


def test_what_the_classifier_sees_is_chosen_by_the_pool():
    model = make()
    features = model.forward_features(pictures())
    for pool, expected in (("token", features[:, 0]), ("avg", features[:, 1:].mean(1)), ("", features)):
        model.reset_classifier(3, pool)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
        torch.testing.assert_close(model(pictures()), model.get_classifier()(expected))
        assert model(pictures()).shape[-1] == model.num_classes == 3
    assert make(num_classes=0)(pictures()).shape == (2, 32)


# Pictures of any size


def test_positions_are_resized_bilinearly_and_the_one_of_cls_stays():
    model = make()
    rows, columns = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")
    model.pos_embed4.data.copy_(torch.cat([torch.tensor([100.0]), (rows + 10 * columns).flatten()])[None, :, None])
    for block in model.block4:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data.zero_(), layer.bias.data.zero_()
    model.norm = nn.Identity()
    embedded = []
    model.patch_embed4.register_forward_hook(lambda *args: embedded.append(args[2].flatten(2).mT))
    out = model.forward_features(pictures(1, 128, 64))
    added = out - torch.cat([model.cls_token, embedded[0]], dim=1)
    expected = torch.tensor([[0.0, 0.25, 0.75, 1.0]]).mT + 10 * torch.tensor([[0.0, 1.0]])  # by hand, 2 x 2 to 4 x 2
    torch.testing.assert_close(added[0, 1:], expected.reshape(-1, 1).expand(-1, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(added[0, 0], torch.full((32,), 100.0))


@pytest.mark.parametrize("parity", [True, False])
def test_only_the_released_computation_ignores_rows_that_a_ratio_leaves_over(parity):
    model = make(parity=parity).double()
    with torch.no_grad():
        for block in (*model.block1, *model.block2, *model.block3):
            block.att.mha.attn.conv.weight.zero_()  # else values of the last rows reach their neighbours
    x = torch.randn(1, 9 * 8, 16, dtype=torch.float64)
    attention = model.block1[0].att.mha
    landmarks = attention.attn.landmarks(x.reshape(1, 1, 72, 16)[..., :8].contiguous(), (9, 8), 1.0)
    assert landmarks.shape[2] == (1 if parity else 2)
    assert model(pictures(1, 33, 32).double()).isfinite().all()


@pytest.mark.parametrize(("settings", "smallest"), [({}, 29), ({"ratios": (4, 4, 2)}, 25), ({"ratios": (1, 1, 1)}, 1)])
def test_pictures_that_are_too_small_are_refused_with_the_smallest_size(settings, smallest):
    model = make(**settings)
    assert model.min_size == smallest
    assert model(pictures(1, smallest, smallest)).isfinite().all()
    if smallest > 1:
        with pytest.raises(ValueError, match=rf"pictures of 64 x {smallest - 1} pixels.*at least {smallest} pixels"):
            model(pictures(1, 64, smallest - 1))
        with pytest.raises(ValueError, match=rf"img_size of 16 x 16 pixels.*at least {smallest} pixels"):
            make(**settings, img_size=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths must be 4 numbers of at least 1, got \(1, 1, 1\)"),
        ({"depths": (1, 1, 0, 1)}, "depths must be 4 numbers"),
        ({"ratios": (8, 4, 2, 1)}, "ratios must be 3 numbers"),
        ({"num_heads": (2, 2, 5, 4)}, r"num_heads must divide embed_dims, got \(2, 2, 5, 4\) and \(16, 16, 24, 32\)"),
        ({"global_pool": "max"}, "global_pool must be one of"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"conv_sizes": (9, 4, 3)}, "conv_size must be odd"),
        ({"backend": "numpy"}, "backend must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SoftTransformer(**(SMALL | settings))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(pictures(chans=1)), r"pictures must be \(B, 3, H, W\), got \(2, 1, 64, 64\)"),
        (lambda model: model(pictures()[0]), r"got \(3, 64, 64\)"),
        (lambda model: model.forward_intermediates(pictures(), [4]), r"stages must be in 0\.\.3.*got \[4\]"),
        (lambda model: model.forward_intermediates(pictures(), 5), r"stages must be in 0\.\.3"),
        (lambda model: model.forward_intermediates(pictures(), output_fmt="NLC"), 'output_fmt must be "NCHW"'),
        (lambda model: model.reset_classifier(3, "max"), "global_pool must be one of"),
    ],
)
def test_calls_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


# Training, dtypes, compilation


def test_the_start_is_that_of_the_papers():
    torch.manual_seed(0)
    state = timm.create_model("soft_tiny").state_dict()
    for name in ("block3.1.att.mha.W_q.weight", "block4.0.mlp.fc1.weight", "head.weight", "pos_embed1"):
        assert state[name].std() == pytest.approx(0.02, rel=0.03)
    for name, fan_out in (
        ("patch_embed4.proj.0.weight", 9 * 512),
        ("block1.0.att.mha.attn.Qlandmark_op.weight", 64 * 32),
        ("block1.0.att.mha.attn.conv.weight", 81),
    ):
        assert state[name].std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.12)
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()


@pytest.mark.parametrize("parity", [True, False])
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(parity):
    model = make("soft_norm_tiny", parity=parity)
    model.train()
    gradients = []
    for lean in (False, True):
        model.set_grad_checkpointing(lean)
        model.zero_grad()
        model(pictures(3)).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, value in gradients[0].items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item())


def test_stochastic_depth_leaves_out_branches_of_a_sample_and_is_off_in_evaluation():
    model = make(drop_path_rate=0.5)
    torch.testing.assert_close(model(pictures()), make()(pictures()))
    rates = [block.att.drop_path.drop_prob for stage in (model.block1, model.block2, model.block3) for block in stage]
    assert [*rates, model.block4[0].drop_path.drop_prob] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    block = model.block4[0].train()
    x = torch.randn(1, 5, 32).expand(400, -1, -1)
    out = block(x, (2, 2))
    kept = [(torch.isclose(row, x[0]).all()).item() for row in out]  # both branches left out: one in four
    assert 60 < sum(kept) < 140
    assert len(out.unique(dim=0)) == 4


def test_layers_are_ordered_by_depth_for_learning_rates():
    model = make()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["pos_embed1"] == layers["patch_embed1.proj.6.weight"] == 0
    order = ["patch_embed1.proj.0.bias", "block1.0.att.ff1.bias", "block2.0.att.ff1.bias", "block3.0.att.ff1.bias"]
    order += ["block3.1.att.ff1.bias", "block4.0.attn.q.bias", "head.bias"]
    assert [layers[name] for name in order] == list(range(7))
    assert layers["patch_embed3.proj.0.bias"] == layers["pos_embed3"] == layers["block3.0.att.norm1.bias"]
    assert layers["cls_token"] == layers["norm.bias"] == layers["block4.0.attn.q.bias"]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["block3.0.att.ff1.bias"] == coarse["block3.1.att.ff1.bias"] == coarse["pos_embed3"] == 3
    assert coarse["cls_token"] == coarse["norm.weight"] == 4
    groups = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    free = {name for name, parameter in model.named_parameters() if id(parameter) not in decayed}
    assert {"cls_token", "pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4"} < free
    assert "head.weight" not in free


@pytest.mark.full  # compiling takes long
@pytest.mark.parametrize(("name", "parity"), [("soft_norm_tiny", True), ("soft_tiny", False)])
def test_it_compiles_as_one_graph_and_takes_other_batches_and_pictures(name, parity):
    model = make(name, parity=parity, depths=(1, 1, 1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=True, backend="eager"
    )  # what its modules become under AOTAutograd is tested with them
    for batch, height, width in ((2, 64, 70), (3, 70, 64)):
        x = pictures(batch, height, width).requires_grad_()
        out, expected = compiled(x), model(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        found, reference = (torch.autograd.grad(each.sum(), x)[0] for each in (out, expected))
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())


@pytest.mark.parametrize(("name", "parity"), [("soft_norm_tiny", True), ("soft_norm_tiny", False), ("soft_tiny", True)])
def test_it_exports_with_a_free_batch(name, parity):
    model = make(name, parity=parity)
    free = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        graph = torch.export.export(model, (pictures(2),), dynamic_shapes=(free,)).module()
        for batch in (1, 5):
            torch.testing.assert_close(graph(pictures(batch)), model(pictures(batch)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parity", [True, False])
def test_no_pictures_give_no_logits_and_meta_pictures_shapes(parity, training):
    model = make(parity=parity).train(training)
    out = model(pictures(0))
    assert out.shape == (0, 10)
    out.sum().backward()
    assert all(buffer.isfinite().all() for buffer in model.buffers()), "statistics of nothing would spoil them"
    assert model.to("meta")(pictures(2).to("meta")).shape == (2, 10)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_stays_near_float32(autocast):
    model, expected = make(), make()(pictures())
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(pictures())
        assert out.dtype == torch.bfloat16
    else:
        out = model.bfloat16()(pictures().bfloat16())
        assert out.dtype == torch.bfloat16
    assert ((out - expected).abs().max() / expected.abs().max()).item() < 0.2


def test_weights_go_through_a_state_dict():
    model, other = make(), timm.create_model("soft_norm_tiny", **SMALL).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(pictures()), model(pictures()))
