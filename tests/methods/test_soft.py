"""SOFT, the method: its settings, what they become on a tower, and where training starts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import LLAVA, shared_model
from torch import nn
from torch.nn import functional as F
from towers import TOWERS, pixels, shared_tower
from unchanged import unchanged

import vltok
from vltok.families import view
from vltok.kernels.gaussian import gaussian_kernel
from vltok.method import Method
from vltok.methods.soft.method import start_from_softmax
from vltok.nn import SoftmaxFreeAttention
from vltok.views import SelfAttention


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "ratio must be at least 1, got 0"),
        ({"ratio": 2.0}, TypeError, r"ratio must be an integer of at least 1, got 2\.0"),
        ({"ratio": True}, TypeError, "ratio must be an integer of at least 1, got True"),
        ({"conv_size": 4}, ValueError, "conv_size must be odd, .* got 4"),
        ({"conv_size": -1}, ValueError, "conv_size must be at least 1, got -1"),
        ({"newton_iters": 0}, ValueError, "newton_iters must be at least 1, got 0"),
        ({"newton_iters": None}, TypeError, "newton_iters must be an integer of at least 1, got None"),
        ({"init": "value"}, ValueError, r"init must be one of 'mean', 'query', 'key', 'random', got 'value'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
        ({"blocks": (0,)}, TypeError, r"blocks must be \(start, stop\), integers or None; got \(0,\)"),
        ({"blocks": (0, 2, 1)}, TypeError, r"blocks must be \(start, stop\)"),
        ({"blocks": (0.0, 2)}, TypeError, r"blocks must be \(start, stop\)"),
        ({"blocks": (False, 2)}, TypeError, r"blocks must be \(start, stop\)"),
        ({"blocks": 2}, TypeError, r"blocks must be \(start, stop\), integers or None; got 2"),
        ({"blocks": range(2)}, TypeError, r"integers or None; got range\(0, 2\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        vltok.SOFT(**settings)


def tower(*grid: int, depth: int = 12) -> SimpleNamespace:
    return SimpleNamespace(vision=SimpleNamespace(grid=grid, depth=depth))


@pytest.mark.parametrize(
    ("side", "ratio", "conv_size", "landmarks"),
    [(8, 2, 3, 4), (14, 2, 3, 7), (16, 2, 3, 8), (24, 3, 3, 8), (27, 4, 5, 7), (37, 5, 5, 8), (56, 8, 9, 7)],
)
def test_by_default_about_seven_landmarks_stand_along_a_side(side, ratio, conv_size, landmarks):
    method = vltok.SOFT().settled(tower(side, side))
    assert method == vltok.SOFT(ratio=ratio, conv_size=conv_size, blocks=(0, 12))
    assert -(-side // method.ratio) == landmarks


def test_settings_of_your_own_stay_and_the_rest_follows_them():
    assert vltok.SOFT(ratio=4).settled(tower(24, 24)).conv_size == 5
    assert vltok.SOFT(ratio=1).settled(tower(24, 24)).conv_size == 1
    assert vltok.SOFT(conv_size=7).settled(tower(24, 24)) == vltok.SOFT(ratio=3, conv_size=7, blocks=(0, 12))
    assert vltok.SOFT().settled(tower(16, 48)).ratio == 2, "the shorter side decides"


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (None, (0, 12)),
        ((0, 6), (0, 6)),
        ((-2, None), (10, 12)),
        ((None, -1), (0, 11)),
        ((None, None), (0, 12)),
        ([3, 99], (3, 12)),
        ((-99, 1), (0, 1)),
    ],
)
def test_blocks_are_a_range_as_python_counts(blocks, expected):
    assert vltok.SOFT(blocks=blocks).settled(tower(8, 8)).blocks == expected


@pytest.mark.parametrize("blocks", [(12, None), (5, 5), (6, 2), (0, -12)])
def test_a_range_without_blocks_is_refused(blocks):
    with pytest.raises(ValueError, match=r"blocks=\(.*\) is none of the 12 blocks"):
        vltok.SOFT(blocks=blocks).settled(tower(8, 8))


def test_a_ratio_larger_than_the_grid_is_refused_before_anything_changes():
    vltok.SOFT(ratio=6).settled(tower(6, 9))
    with pytest.raises(ValueError, match=r"ratio=7 is larger than .* grid of 6 x 9 patches; use at most 6"):
        vltok.SOFT(ratio=7).settled(tower(6, 9))
    model = shared_tower(TOWERS["clip"])
    with unchanged(model), pytest.raises(ValueError, match="use at most 4"):
        vltok.apply(model, [vltok.SOFT(blocks=(0, 1)), vltok.SOFT(ratio=5, blocks=(1, 2))])


@pytest.mark.parametrize(
    "method", [vltok.SOFT(), vltok.SOFT(ratio=2, blocks=(-2, None), init="mean"), vltok.SOFT(normalize=False)], ids=str
)
def test_settings_survive_a_json_file(method):
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert Method.from_text(json.dumps(method.to_dict())) == method


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("soft", vltok.SOFT()),
        ("soft,ratio=2,blocks=(0,2)", vltok.SOFT(ratio=2, blocks=(0, 2))),
        ("soft,blocks=(-2,None),normalize=False", vltok.SOFT(blocks=(-2, None), normalize=False)),
        ("soft,init=key,backend=torch", vltok.SOFT(init="key", backend="torch")),
    ],
)
def test_command_lines_name_it(text, method):
    assert Method.from_text(text) == method


def test_it_says_that_it_needs_training():
    assert not vltok.SOFT.training_free
    assert "Not training-free" in vltok.SOFT.__doc__.splitlines()[0]


# On a model


def test_the_report_says_where_it_stands(capsys):
    model = shared_tower(TOWERS["clip"])
    with vltok.apply(model, vltok.SOFT(ratio=3, blocks=(1, None))) as handle:
        report = handle.report()
        assert handle.loss() == 0
    assert capsys.readouterr().out == (
        "vision tower: softmax-free attention in blocks 1 to 2, 4 landmarks for 16 patches\n"
    )
    assert report.attention == vltok.report.LinearAttention(blocks=(1, 3), patches=16, landmarks=4)


def test_settings_reach_the_modules_and_only_the_chosen_blocks():
    model = shared_tower(TOWERS["dinov2-registers"])
    before = [view(model).vision.attention_module(block) for block in range(3)]
    method = vltok.SOFT(2, 5, normalize=False, blocks=(0, 2), newton_iters=7, backend="torch")
    with vltok.apply(model, method) as handle:
        assert handle.methods == (method,)
        attentions = [view(model).vision.attention_module(block) for block in range(3)]
        assert attentions[:2] == list(handle.added_modules) and attentions[2] is before[2]
        for attention in handle.added_modules:
            inner = attention.attn
            assert (attention.dim, attention.num_heads, attention.num_prefix_tokens) == (32, 2, 4)
            assert (inner.ratio, inner.conv.kernel_size, inner.newton_iters) == (2, (5, 5), 7)
            assert (inner.normalize, inner.backend, inner.parity) == (False, "torch", False)


def test_the_tower_of_a_llava_is_seen_alone_and_inside():
    model = shared_model(LLAVA)
    with vltok.apply(model, vltok.SOFT(ratio=2)) as handle:
        inside = handle.methods, handle.family, model.model.vision_tower.config.hidden_act
    with vltok.apply(model.model.vision_tower, vltok.SOFT(ratio=2)) as handle:
        alone = handle.methods, handle.family, model.model.vision_tower.config.hidden_act
    assert inside == (alone[0], "llava", alone[2]) and alone[1] == "clip"


# Where training starts

QUERY_KEY_MEAN = ["query", "key", "mean"]


def read(name: str) -> SelfAttention:
    return view(shared_tower(TOWERS[name])).vision.self_attention(1)


def start(old: SelfAttention, init: str, ratio: int = 2, normalize: bool = True, prefix: int = 0, patches: int = 16):
    attention = SoftmaxFreeAttention(32, old.num_heads, ratio, 3, normalize, num_prefix_tokens=prefix)
    start_from_softmax(attention, old, init, patches)
    return attention


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("init", QUERY_KEY_MEAN)
@pytest.mark.parametrize("name", ["clip", "siglip", "vit-classifier", "timm-no-class", "timm-eva"])
def test_the_kernel_sees_the_differences_of_the_pretrained_projection(name, init):
    old, x = read(name), noise(1, 9, 32)
    query, key = F.linear(x, *old.query), F.linear(x, *old.key)
    expected = {"query": query, "key": key, "mean": (query + key) / 2}[init]
    found = start(old, init).W_q(x)
    torch.testing.assert_close(found - found[:, :1], expected - expected[:, :1], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("init", QUERY_KEY_MEAN)
@pytest.mark.parametrize(("name", "prefix"), [("siglip", 0), ("clip", 1), ("timm-eva", 1)])
def test_landmarks_start_as_normed_means_of_the_queries_of_their_region(name, prefix, init):
    attention = start(read(name), init, prefix=prefix)
    x = noise(2, prefix + 24, 32)
    query = heads(attention.W_q(x)) / 2  # 16 ** 0.25
    landmarks = attention.attn.landmarks(2 * query, (4, 6), 0.5)
    norm = attention.attn.Qnorm_act[0]
    image = query[:, :, prefix:].flatten(0, 1).mT.unflatten(-1, (4, 6))
    means = F.avg_pool2d(image, 2).flatten(2).mT.unflatten(0, (2, 2))
    spread, shift = norm.weight.unique().item(), norm.bias.unique().item()
    expected = F.layer_norm(means, (16,)) * spread + shift
    assert landmarks.shape == (2, 2, 6 + prefix, 16)
    torch.testing.assert_close(landmarks[:, :, :6], expected, rtol=0.01, atol=0)
    assert torch.equal(landmarks[:, :, 6:], query[:, :, :prefix])
    assert abs((query - shift).std() / spread - 1) < 0.1, "means are normed to the spread that queries have"
    assert landmarks.min() > 2, "where GELU is linear"


@torch.no_grad()
@pytest.mark.parametrize("init", QUERY_KEY_MEAN)
@pytest.mark.parametrize(("normalize", "ridge"), [(True, 0.0), (False, 0.01)], ids=["norm", "plain"])
def test_equal_tokens_get_what_softmax_gives_them_as_far_as_landmarks_are_like_queries(init, normalize, ridge):
    """Softmax gives each its own value. Here a head gives it times k^2, k being the kernel of query and landmark."""
    old = read("siglip")
    attention = start(old, init, normalize=normalize)
    x = noise(2, 1, 32).expand(2, 16, 32)
    query = heads(attention.W_q(x)) / 2
    kernel = gaussian_kernel(query, attention.attn.landmarks(2 * query, (4, 4), 0.5))[:, :, :1, :1]
    values = heads(F.linear(x, *old.value)) * kernel**2 * 4 / (4 + ridge)  # of four landmarks
    expected = F.linear(values.transpose(1, 2).flatten(2), *old.out)
    softmax = old.module(x)[0]
    torch.testing.assert_close(attention(x, (4, 4)), expected, rtol=0, atol=2e-4 * softmax.abs().max().item())
    assert kernel.min() > 0.05 and kernel.max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("normalize", [True, False], ids=["norm", "plain"])
def test_queries_that_tell_nothing_give_the_mean_of_all_values_as_softmax_does(normalize):
    old = read("timm-no-class")
    silent = torch.zeros(32, 32), torch.zeros(32)
    blind = SelfAttention(old.module, 2, silent, old.key, old.value, old.out)
    x = noise(2, 16, 32)
    expected = F.linear(F.linear(x, *old.value).mean(1, keepdim=True), *old.out).expand(2, 16, 32)
    found = start(blind, "query", normalize=normalize)(x, (4, 4))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * expected.abs().max().item())


def test_a_random_start_takes_nothing_and_every_start_is_of_the_same_shape():
    model = shared_tower(TOWERS["timm-vit"])
    found = {}
    for init in [*QUERY_KEY_MEAN, "random"]:
        with vltok.apply(model, vltok.SOFT(ratio=2, init=init, blocks=(0, 1))) as handle:
            found[init] = handle.added_modules[0].state_dict()
    old = view(model).vision.self_attention(0)
    assert len({tuple((name, value.shape) for name, value in state.items()) for state in found.values()}) == 1
    for init in QUERY_KEY_MEAN:
        assert torch.equal(found[init]["ff.weight"], old.out[0])
        assert not torch.equal(found["random"]["ff.weight"], old.out[0])
        assert torch.equal(found[init]["attn.conv.weight"], torch.zeros(2, 1, 3, 3))
    assert found["random"]["attn.conv.weight"].abs().sum() > 0


@pytest.mark.parametrize("init", [*QUERY_KEY_MEAN, "random"])
@pytest.mark.parametrize("normalize", [True, False], ids=["norm", "plain"])
def test_every_weight_learns_from_the_start(init, normalize):
    model = TOWERS["clip"].model()
    torch.manual_seed(0)
    with vltok.apply(model, vltok.SOFT(ratio=2, init=init, normalize=normalize)) as handle:
        weights = [weight for module in handle.added_modules for weight in module.parameters()]
        before = [weight.detach().clone() for weight in weights]
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            model(pixels()).last_hidden_state.square().mean().backward()
            optimizer.step()
    assert len(weights) == 3 * 10
    assert not any(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_the_start_is_made_in_float32_and_kept_in_the_models_dtype():
    old, half = read("clip"), TOWERS["clip"].model().to(torch.bfloat16)
    with vltok.apply(half, vltok.SOFT(ratio=2)) as handle:
        found = handle.added_modules[1].W_v
    expected = start(old, "query", prefix=1).W_v
    assert found.weight.dtype == torch.bfloat16
    torch.testing.assert_close(found.weight.float(), expected.weight, rtol=0.02, atol=1e-3)
    assert isinstance(found, nn.Linear)
