"""TAP's backbones in training: where weights start, gradients, checkpointing, attention to be seen, compilation."""

from __future__ import annotations

import pytest
import timm
import torch
from tap_backbones import FAN, NAMES, RVT, make, pictures
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from vltok.methods.adl.diversification import attention_diversification_loss


def step(model: nn.Module, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of a training step, and the buffers after it; stochastic depth always draws the same."""
    torch.manual_seed(0)
    model.train().zero_grad()
    model(x).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return gradients, {name: value.clone() for name, value in model.named_buffers()}


def test_fan_starts_as_published():
    torch.manual_seed(0)
    model = timm.create_model(FAN, depth=2)
    state = model.state_dict()
    for name in (
        "blocks.1.attn.kv.weight",
        "blocks.0.mlp.mlp_v.fc1.weight",
        "cls_attn_blocks.1.attn.v.weight",
        "patch_embed.backbone.stages.1.downsample.1.weight",
        "head.weight",
    ):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("conv1", "conv2"):
        assert state[f"blocks.1.mlp.mlp_v.dwconv.{name}.weight"].std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    for name in ("blocks.0.attn.q.bias", "cls_attn_blocks.0.mlp.fc1.bias", "head.bias"):
        assert not state[name].any()
    for name in ("blocks.0.gamma1", "blocks.1.mlp.temperature", "blocks.1.mlp.mlp_v.gamma", "cls_attn_blocks.0.gamma2"):
        assert (state[name] == 1).all()
    assert (state["patch_embed.backbone.stages.0.blocks.2.gamma"] == 1e-6).all()
    model.reset_classifier(5000)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_rvt_starts_as_published():
    torch.manual_seed(0)
    model = timm.create_model(RVT, depth=6)
    masks = [block.attn.att_mask for block in model.blocks]
    assert masks.pop() is None
    for mask in masks:
        assert mask.abs().max() <= 0.02  # cut off at one deviation
        assert mask.std().item() == pytest.approx(0.0108, rel=0.02)
    bound = 768**-0.5  # PyTorch's own start
    assert bound * 0.99 < model.blocks[5].attn.qkv.weight.abs().max() <= bound


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_neither_gradients_nor_statistics(name):
    model = make(name, drop_path_rate=0.3)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    results, calls = [], []
    watched = [model.blocks[0].attn] + ([model.patch_embed.backbone.stages[0].blocks[0].norm] if name == FAN else [])
    for part in watched:
        part.register_forward_hook(lambda *args: calls.append(args))
    for lean in (False, True):
        model.load_state_dict(start)
        model.set_grad_checkpointing(lean)
        results.append(step(model, pictures(3)))
    assert len(calls) == 3 * len(watched)  # once, then twice
    out = model(pictures(3)).sum()
    for _ in range(2):
        out.backward(retain_graph=True)
    (gradients, buffers), (lean_gradients, lean_buffers) = results
    assert gradients.keys() == {key for key, _ in model.named_parameters()}
    largest = max(value.abs().max().item() for value in gradients.values())
    for key, value in gradients.items():
        torch.testing.assert_close(lean_gradients[key], value, rtol=1e-4, atol=1e-6 * largest)
    for key, value in buffers.items():
        assert torch.equal(lean_buffers[key], value), key
        assert not torch.equal(start[key], value), key
    assert model.blocks[0].mlp.training
    assert all(part.track_running_stats for part in model.modules() if isinstance(part, nn.BatchNorm2d))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_part_in_the_logits(name):
    model = make(name).double()
    x = pictures().double()
    with torch.no_grad():
        expected = model(x)
        for key, parameter in model.named_parameters():
            before = parameter.clone()
            parameter.add_(torch.randn_like(parameter).mul_(0.1))
            change = (model(x) - expected).abs().max()
            parameter.copy_(before)
            cancels = name == FAN and key.endswith(("mlp.q.bias", "attn.k.bias"))  # a softmax takes it out
            assert change < 1e-9 if cancels else change > 1e-7, key
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "rates"), [(FAN, [0.5, 0.5, 0.5]), (RVT, [0, 0.25, 0.5])])
def test_stochastic_depth_leaves_out_branches_of_a_sample_and_is_off_in_evaluation(name, rates):
    model = make(name, drop_path_rate=0.5)
    torch.testing.assert_close(model(pictures()), make(name)(pictures()))
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx(rates)
    block = model.blocks[2]
    block.drop_path.train()
    x = torch.randn(1, 6, 24).expand(400, -1, -1)
    out = block(x, (2, 3))
    kept = [(torch.isclose(row, x[0]).all()).item() for row in out]  # both branches left out: one in four
    assert 60 < sum(kept) < 140
    assert len(out.detach().round(decimals=3).unique(dim=0)) == 4


@pytest.mark.parametrize("name", NAMES)
def test_attention_maps_are_to_be_seen_and_trained(name):
    model = make(name).train()
    maps = []
    for attention in model.token_attentions():
        attention.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    model(pictures(2, 64, 80))
    assert [tuple(each.shape) for each in maps] == [(2, 4, 20, 20)] * 3
    for each in maps:
        torch.testing.assert_close(each.sum(-1), torch.ones(2, 4, 20))
    attention_diversification_loss(maps, threshold=1.0).backward()
    grad = model.blocks[2].attn.get_submodule("kv" if name == FAN else "qkv").weight.grad
    assert grad.abs().max() > 0


def test_layers_of_fan_are_ordered_by_depth_for_learning_rates():
    model = make(FAN)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    order = ["patch_embed.proj.bias", "blocks.0.gamma1", "blocks.1.attn.q.bias", "blocks.2.mlp.temperature"]
    order += ["cls_attn_blocks.0.gamma1", "cls_attn_blocks.1.gamma1", "head.bias"]
    assert [layers[key] for key in order] == list(range(7))
    assert layers["pos_embed.token_projection.bias"] == layers["patch_embed.backbone.stem.0.bias"] == 0
    assert (layers["cls_token"], layers["norm.bias"]) == (4, 5)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert [coarse[key] for key in order] == [0, 1, 1, 1, 2, 2, 3]
    assert coarse["cls_token"] == coarse["norm.weight"] == 2


def test_layers_of_rvt_are_ordered_by_depth_for_learning_rates():
    model = make(RVT)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    order = ["patch_embed.proj.0.bias", *(f"transformers.0.blocks.{i}.mlp.fc1.bias" for i in range(3)), "head.bias"]
    assert [layers[key] for key in order] == list(range(5))
    assert layers["norm.bias"] == 3
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert [coarse[key] for key in order] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "free", "decayed"),
    [
        (FAN, {"cls_token", "blocks.1.mlp.temperature", "pos_embed.token_projection.weight"}, "blocks.0.attn.q.weight"),
        (RVT, {"transformers.0.blocks.1.attn.att_mask"}, "transformers.0.blocks.1.attn.qkv.weight"),
    ],
)
def test_weight_decay_leaves_embeddings_alone(name, free, decayed):
    model = make(name)
    groups = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay())
    shrunk = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    spared = {key for key, parameter in model.named_parameters() if id(parameter) not in shrunk}
    assert free < spared
    assert decayed not in spared


SIZES = [(2, 64, 80), (3, 48, 96)]  # batch, height, width


@pytest.mark.full  # compiling takes long
@pytest.mark.parametrize("mode", ["evaluation", "training", "checkpointing"])
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_as_one_graph_for_any_batch_and_size(name, mode):
    torch._dynamo.reset()
    training = mode != "evaluation"
    model = make(name, depth=1).train(training)
    model.set_grad_checkpointing(mode == "checkpointing")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in SIZES:
        x = pictures(*size).requires_grad_()
        with torch.set_grad_enabled(training):
            out, expected = compiled(x), model(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        if training:
            own = [x, *model.parameters()]
            pairs = [torch.autograd.grad(each.square().sum(), own) for each in (out, expected)]
            for found, reference in zip(*pairs, strict=True):
                scale = max(1, reference.abs().max().item())
                torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_it_exports_for_any_batch(name):
    model = make(name, depth=1)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (pictures(3),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 2, 5):
        torch.testing.assert_close(exported(pictures(size)), model(pictures(size)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_pictures_give_no_logits_and_meta_tensors_shapes(name):
    model = make(name, depth=1)
    assert model(pictures(0)).shape == (0, 10)
    out = model.to("meta")(pictures(2, 32, 48).to("meta"))
    assert (out.shape, out.device.type) == ((2, 10), "meta")


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_near_float32(name, autocast):
    model, expected = make(name), make(name)(pictures())
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(pictures())
    else:
        out = model.bfloat16()(pictures().bfloat16())
    assert out.dtype == torch.bfloat16
    assert ((out - expected).abs().max() / expected.abs().max()).item() < 0.2
