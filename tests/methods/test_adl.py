"""ADL on real towers: its loss is that of the attention maps the model itself gives, in train mode and there alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from towers import PAIRS, TOWERS, pixels, shared_tower
from unchanged import unchanged

import vltok
from vltok.errors import EditConflictError, UnsupportedModelError
from vltok.nn import attention_diversification_loss

ADL = vltok.ADL(weight=0.5, threshold=1.2)
HF = [name for name, tower in TOWERS.items() if tower.is_hf]
FUSED = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def maps(name: str, model: torch.nn.Module) -> list[torch.Tensor]:
    """The attention maps of all blocks, (B, heads, N, N), as the library itself gives them for each picture alone."""
    tower = TOWERS[name]
    if name == "clip-model":
        model = model.vision_model
    if tower.is_hf:
        tower = replace(tower, call="__call__", inputs=tower.bare or tower.inputs)
        alone = [tower.output(model, picture, output_attentions=True).attentions for picture in pixels().split(1)]
        return [torch.cat(own) for own in zip(*alone, strict=True)]
    seen = []
    hooks = [b.attn.attn_drop.register_forward_hook(lambda m, args, out: seen.append(args[0])) for b in model.blocks]
    tower.tokens(model, pixels())
    for hook in hooks:
        hook.remove()
    return seen


def losses(pair_name: str, model: torch.nn.Module, **options):
    """The loss of one call, and the model's gradients of it."""
    with vltok.apply(model, ADL, **options) as handle:
        TOWERS[pair_name].tokens(model, pixels())
        loss = handle.loss()
        report = handle.report(file=None).diversification
    model.zero_grad()
    loss.backward()
    return loss, report, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def no_dropout(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).train()


@FUSED
@pytest.mark.parametrize("name", TOWERS)
def test_the_loss_and_its_gradients_are_those_of_the_models_own_maps(name, attention):
    model = no_dropout(shared_tower(TOWERS[name], attention))
    loss, report, grads = losses(name, model)
    eager = no_dropout(shared_tower(TOWERS[name], "eager"))
    expected = 0.5 * attention_diversification_loss(maps(name, eager), 1.2)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert loss > 0.05
    expected.backward()
    wanted = {key: p.grad for key, p in eager.named_parameters() if p.grad is not None and p.grad.abs().sum() > 1e-7}
    assert len(wanted) > 20
    for key, gradient in wanted.items():
        atol = 1e-4 * gradient.abs().max().item() + 1e-8
        torch.testing.assert_close(grads[key], gradient, rtol=0, atol=atol, msg=key)
    assert len(report.losses) == 3
    torch.testing.assert_close(0.5 * sum(report.losses) / 3, loss.detach())


@pytest.mark.parametrize("name", ["clip", "timm-vit"])
def test_eval_mode_leaves_no_loss_and_makes_none(name, monkeypatch):
    model = copy.deepcopy(shared_tower(TOWERS[name]))
    calls = []
    original = vltok.methods.adl.method.score_diversification_loss
    monkeypatch.setattr(
        vltok.methods.adl.method, "score_diversification_loss", lambda *args: calls.append(args) or original(*args)
    )
    with vltok.apply(model, ADL) as handle:
        assert handle.loss() == 0
        assert "no call in train mode yet" in str(handle.report(file=None))
        TOWERS[name].tokens(model, pixels())
        assert handle.loss() == 0 and not calls
        TOWERS[name].tokens(model.train(), pixels())
        assert handle.loss() > 0 and len(calls) == 3
        TOWERS[name].tokens(model.eval(), pixels())
        assert handle.loss() == 0, "a loss of earlier pictures must not be added to anything"
        assert len(calls) == 3


@pytest.mark.parametrize("name", ["clip", "timm-vit"])
def test_a_range_of_blocks_counts_alone(name):
    model = no_dropout(shared_tower(TOWERS[name], "eager"))
    with vltok.apply(model, vltok.ADL(threshold=1.2, blocks=(-2, None))) as handle:
        TOWERS[name].tokens(model, pixels())
        found = handle.loss()
    torch.testing.assert_close(found, attention_diversification_loss(maps(name, model)[1:], 1.2), rtol=1e-4, atol=1e-6)


def test_each_call_starts_anew():
    model = no_dropout(shared_tower(TOWERS["timm-vit"]))
    with vltok.apply(model, ADL) as handle:
        model(pixels())
        first = handle.loss()
        model(pixels())
        torch.testing.assert_close(handle.loss(), first)


@pytest.mark.parametrize("name", ["clip", "timm-vit"])
def test_an_adapter_on_queries_counts(name):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj"] if name == "clip" else ["qkv"]
    base = copy.deepcopy(shared_tower(TOWERS[name]))
    config = LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    adapted = get_peft_model(base, config).train()
    with vltok.apply(adapted, ADL) as handle:
        TOWERS[name].tokens(adapted.base_model.model, pixels())
        handle.loss().backward()
    trained = [p for key, p in adapted.named_parameters() if "lora" in key]
    assert trained and all(p.grad is not None for p in trained[:2]) and trained[1].grad.abs().sum() > 0


def test_nothing_above_the_threshold_is_reported():
    model = no_dropout(shared_tower(TOWERS["timm-vit"]))
    with vltok.apply(model, vltok.ADL(threshold=1000.0)) as handle:
        model(pixels())
        assert handle.loss() == 0
        handle.loss().backward()
        assert "in 3 of 3 no attention exceeds the threshold" in str(handle.report(file=None))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_autocast_gives_nearly_the_same_loss():
    model = no_dropout(shared_tower(TOWERS["timm-vit"]))
    with vltok.apply(model, ADL) as handle:
        model(pixels())
        expected = handle.loss()
        with torch.autocast("cpu", torch.bfloat16):
            model(pixels())
        torch.testing.assert_close(handle.loss(), expected, rtol=0.05, atol=0.01)
        handle.loss().backward()


def test_it_does_not_keep_a_checkpoint_from_loading(tmp_path):
    model = copy.deepcopy(shared_tower(TOWERS["clip"]))
    with vltok.apply(model, ADL) as handle:
        model.save_pretrained(tmp_path / "whole")
        vltok.save(handle, tmp_path / "own")
    loaded = type(model).from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded(pixels())[0], model(pixels())[0])
    with vltok.load(model, tmp_path / "own") as handle:
        assert handle.methods == (vltok.ADL(weight=0.5, threshold=1.2, blocks=(0, 3)),)


def test_attention_that_exposes_no_probabilities_is_refused_and_blocks_can_be_left_out():
    model = copy.deepcopy(shared_tower(TOWERS["timm-vit"]))
    with vltok.apply(model, vltok.SOFT(ratio=2, blocks=(0, 1))):
        with unchanged(model), pytest.raises(UnsupportedModelError, match="exposes no attention probabilities"):
            vltok.apply(model, ADL)
        with vltok.apply(model, vltok.ADL(threshold=1.2, blocks=(1, None))) as handle:
            model.train()(pixels())
            assert handle.loss() > 0


def test_differential_attention_is_refused():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, attn_layer="diff")
    with unchanged(model), pytest.raises(UnsupportedModelError, match="exposes no attention probabilities"):
        vltok.apply(model, ADL)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tap_fan_base_16_p4_hybrid", {"conv_dims": (8, 16), "conv_depths": (1, 1), "embed_dim": 16, "num_heads": 2}),
        ("tap_rvt_base_plus", {"embed_dim": 16, "num_heads": 2}),
    ],
)
def test_the_papers_backbones_are_trained_with_it(name, settings, checkpointing):
    import timm

    import vltok.models

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, depth=3, **settings).train()
    model.set_grad_checkpointing(checkpointing)
    seen = []
    hooks = [
        each.attn_drop.register_forward_hook(lambda m, args, out: seen.append(out)) for each in model.token_attentions()
    ]
    with vltok.apply(model, vltok.ADL(threshold=0.9)) as handle:
        assert handle.family == "tap_backbone"
        model(torch.randn(2, 3, 64, 96))
        expected = attention_diversification_loss(seen[:3], 0.9)
        torch.testing.assert_close(handle.loss(), expected)
        handle.loss().backward()
        assert model.blocks[0].attn.q.weight.grad.abs().sum() > 0 if hasattr(model.blocks[0].attn, "q") else True
        assert len(handle.report(file=None).diversification.losses) == 3
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    with unchanged(model), pytest.raises((UnsupportedModelError, EditConflictError)):
        vltok.apply(model, vltok.TAP())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"weight": -1}, ValueError, "weight must be finite and at least 0"),
        ({"weight": "1"}, TypeError, "weight must be a number"),
        ({"threshold": 0}, ValueError, "threshold must be finite and above 0"),
        ({"threshold": float("nan")}, ValueError, "threshold must be finite"),
        ({"blocks": 3}, TypeError, "blocks must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        vltok.ADL(**settings)


def test_every_tower_has_a_row_in_the_contract():
    assert {f"{name}-{row}" for name in TOWERS for row in ("tap", "adl", "tap-adl")} <= PAIRS.keys()


@pytest.mark.parametrize("methods", [[ADL], [vltok.TAP(num_scales=2), ADL]], ids=["adl", "tap-adl"])
def test_it_counts_under_ddp(methods):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model = no_dropout(shared_tower(TOWERS["timm-vit"]))
    handle = vltok.apply(model, methods)
    grads = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for net in (model, DistributedDataParallel(model)):
            model.zero_grad()
            loss = net(pixels()).square().mean() + 10 * handle.loss()
            loss.backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        dist.destroy_process_group()
    assert grads[0].keys() == grads[1].keys()
    torch.testing.assert_close(grads[0], grads[1])
