"""TokenPackerProjector against the released module's numbers and a plain version with torch.nn.MultiheadAttention."""

from __future__ import annotations

import copy
import itertools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eval.measure import cpu_allocations
from vltok.errors import CheckpointError
from vltok.methods.condensing.token_packer import projector as packer
from vltok.nn import TokenPackerProjector

DATA = Path(__file__).parents[1] / "data"
SETTINGS = json.loads((DATA / "tokenpacker.json").read_text())
SMALL = {"grid": (4, 6), "dim": 8, "hidden": 12, "scale_factor": 2, "num_levels": 3, "embed_dim": 16, "num_heads": 4}


def make(seed: int = 0, **changes) -> TokenPackerProjector:
    """A small projector whose weights are large enough that attention is peaked and every norm and bias counts."""
    torch.manual_seed(seed)
    projector = TokenPackerProjector(**(SMALL | changes))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.5 if parameter.dim() < 2 else parameter.shape[1] ** -0.5 * 2)
            )
    return projector


def features(projector: TokenPackerProjector, batch: int = 3) -> torch.Tensor:
    rows, columns = projector.grid
    return torch.randn(batch, rows * columns, projector.num_levels * projector.dim)


def plain(projector: TokenPackerProjector, features: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Region after region with torch.nn.MultiheadAttention; the point query written out for each scale."""
    weights, s = projector.state_dict(), projector.scale_factor
    attention = nn.MultiheadAttention(
        projector.q_proj_1.out_features, projector.clip_attn.num_heads, batch_first=True, dtype=features.dtype
    )
    attention.load_state_dict({k.removeprefix("clip_attn."): v for k, v in weights.items() if "clip_attn" in k})

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"])
        return x @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    rows, columns = projector.grid
    features, coarse = (x.unflatten(1, (rows, columns)) for x in (features, coarse))
    tokens = []
    low, high = (s - 1) // 2, s // 2  # the middle cell of an odd region, the middle 2 x 2 of an even one
    for top in range(0, rows, s):
        for left in range(0, columns, s):
            region = features[:, top : top + s, left : left + s].flatten(1, 2)
            middle = (
                coarse[:, top + low : top + high + 1, left + low : left + high + 1].flatten(1, 2).mean(1, keepdim=True)
            )
            query = norm("ln_q_1", middle @ weights["q_proj_1.weight"].T)
            keys, values = norm("ln_k_1", mlp("k_proj_1", region)), norm("ln_v_1", mlp("v_proj_1", region))
            tokens.append(mlp("mlp", attention(query, keys, values)[0]))
    return torch.cat(tokens, dim=1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", SETTINGS)
def test_it_equals_the_released_module(name):
    data = load_file(DATA / f"tokenpacker_{name}.safetensors")
    weights = {key.removeprefix("sd."): value for key, value in data.items() if key.startswith("sd.")}
    projector = TokenPackerProjector.from_official(weights, **SETTINGS[name])
    coarse, levels = data["in.x"].requires_grad_(), data["in.x_multi"].requires_grad_()
    out = projector(levels, coarse)
    assert error(out, data["out.y"]) < 1e-5
    compared = 0
    for kind, loss in (("grad_sum", out.sum()), ("grad_cot", (out * data["in.cot"]).sum())):
        projector.zero_grad()
        coarse.grad = levels.grad = None
        loss.backward(retain_graph=True)
        found = {"x": coarse.grad, "x_multi_row_sums": levels.grad.sum(-1)}
        found |= {key: parameter.grad for key, parameter in projector.named_parameters()}
        for key, expected in data.items():
            if key.startswith(f"{kind}."):
                assert error(found[key.removeprefix(f"{kind}.")], expected) < 1e-5, key
                compared += 1
    assert compared == 7


def drawn(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers that depend on seed and name alone, in the manner of the golden vectors' recipe."""
    stream = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    noise = torch.from_numpy(stream.standard_normal(shape))
    if name.startswith("input:"):
        return noise.float()
    if len(shape) > 1:
        return (noise * 1.3 / shape[1] ** 0.5).float()
    return (1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise).float()


def test_it_equals_the_released_module_at_the_released_size():
    data = load_file(DATA / "tokenpacker_s2_full_recipe.safetensors")
    projector = TokenPackerProjector(24, 1024, 4096, 2)
    assert sum(parameter.numel() for parameter in projector.parameters()) == 36_722_688
    projector.load_state_dict({key: drawn(120, key, tuple(v.shape)) for key, v in projector.state_dict().items()})
    coarse = drawn(120, "input:x", (1, 576, 1024)).requires_grad_()
    out = projector(drawn(120, "input:x_multi", (1, 576, 4096)), coarse)
    out.sum().backward()
    assert error(out[0, 0], data["out.y_token0"]) < 1e-5
    assert error(out[:, :, ::16], data["out.y_strided"]) < 1e-5
    assert error(coarse.grad[:, ::7, ::16], data["grad_sum.x_strided"]) < 1e-5
    assert error(projector.q_proj_1.weight.grad[::32, ::32], data["grad_sum.q_proj_1.weight_strided"]) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    scale=st.integers(1, 5),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    levels=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 8]),
    batch=st.integers(1, 6),
)
def test_it_equals_plain_attention_in_every_region(scale, rows, columns, levels, heads, batch):
    grid = (rows * scale, columns * scale)
    projector = make(grid=grid, scale_factor=scale, num_levels=levels, num_heads=heads).double()
    x, coarse = features(projector, batch).double(), torch.randn(batch, grid[0] * grid[1], 8).double()
    expected = plain(projector, x, coarse)
    assert expected.shape == (batch, projector.num_tokens, 12)
    torch.testing.assert_close(projector(x, coarse), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(projector(x, coarse), expected, rtol=1e-6, atol=1e-6)


def test_point_queries_come_from_the_last_level_by_default():
    projector = make()
    x = features(projector)
    assert torch.equal(projector(x), projector(x, x[..., -8:]))
    assert not torch.allclose(projector(x), projector(x, x[..., :8]), atol=1e-2)


def test_gradients_are_those_of_plain_attention_and_reach_every_parameter():
    projector = make().double()
    x = features(projector, 5).double().requires_grad_()
    found = torch.autograd.grad(projector(x).square().sum(), [x, *projector.parameters()])
    reference = plain_with_grad(projector, x)
    for (name, _), gradient, expected in zip([("x", x), *projector.named_parameters()], found, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5, msg=name)
        assert gradient.abs().sum() > 0, name


def plain_with_grad(projector: TokenPackerProjector, x: torch.Tensor) -> list[torch.Tensor]:
    """Gradients through torch's own modules: no recomputation, no moved projections."""
    heads, s, (rows, columns) = projector.clip_attn.num_heads, projector.scale_factor, projector.grid
    out = []
    for part in (projector.k_proj_1, projector.v_proj_1):
        y = nn.Sequential.forward(part, x).unflatten(1, (rows // s, s, columns // s, s)).transpose(2, 3)
        out.append(y.flatten(3, 4).flatten(0, 2))
    query = F.avg_pool2d(x[..., -projector.dim :].mT.unflatten(-1, (rows, columns)), s).flatten(2).mT
    query = projector.ln_q_1(projector.q_proj_1(query)).flatten(0, 1).unsqueeze(1)
    keys, values = projector.ln_k_1(out[0]), projector.ln_v_1(out[1])
    attended, _ = F.multi_head_attention_forward(
        *(t.transpose(0, 1) for t in (query, keys, values)),
        query.shape[-1],
        heads,
        projector.clip_attn.in_proj_weight,
        projector.clip_attn.in_proj_bias,
        None,
        None,
        False,
        0.0,
        projector.clip_attn.out_proj.weight,
        projector.clip_attn.out_proj.bias,
    )
    tokens = nn.Sequential.forward(projector.mlp, attended.squeeze(0))
    return torch.autograd.grad(tokens.square().sum(), [x, *projector.parameters()])


def held_bytes(projector: TokenPackerProjector, x: torch.Tensor) -> int:
    """Bytes that autograd holds after the forward pass, weights and input aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *projector.parameters())}
    held: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = projector(x)
    assert out.requires_grad
    return sum(held.values())


def test_autograd_holds_half_of_what_it_would_without_recomputation(monkeypatch):
    projector = make(grid=12, dim=32, hidden=64, embed_dim=64)
    x = features(projector, 8)
    lean = held_bytes(projector, x)
    monkeypatch.setattr(packer, "recomputed", lambda function, *inputs: function(*inputs))
    assert lean <= held_bytes(projector, x) / 2


def test_without_autograd_nothing_is_held_that_is_done_with():
    projector = make(grid=12, dim=32, hidden=64, embed_dim=64)
    x = features(projector, 8)
    with torch.no_grad():
        allocated = [size for _, size in cpu_allocations(lambda: projector(x))]
    rows = x.shape[0] * x.shape[1] * 64 * 4  # bytes of all patches, as keys are
    assert max(itertools.accumulate(allocated)) < 3 * rows


class Bent(nn.Linear):
    """What an adapter or a quantized layer is: a linear layer that is more than its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sin()


@pytest.mark.parametrize("place", ["k_proj_1.0", "k_proj_1.2", "v_proj_1.0", "v_proj_1.2", "mlp.0", "mlp.2"])
@pytest.mark.parametrize("kind", ["replaced", "hooked"])
def test_a_layer_that_does_more_than_multiply_is_called_also_under_autograd(place, kind):
    projector = make()
    x = features(projector)
    plain = projector(x)
    old = projector.get_submodule(place)
    if kind == "replaced":
        layer = Bent(old.in_features, old.out_features)
        layer.load_state_dict(old.state_dict())
        projector.set_submodule(place, layer)
    else:
        old.register_forward_hook(lambda module, args, output: output.sin())
    with torch.no_grad():
        expected = projector(x)
    torch.testing.assert_close(projector(x), expected, rtol=1e-4, atol=1e-4)
    assert error(expected, plain) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    projector = make()
    x = features(projector)
    with torch.no_grad():
        found = copy.deepcopy(projector).to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        assert error(found.float(), projector(x)) < 0.05


def test_autocast_gives_float32_gradients_near_those_without():
    projector = make()
    x = features(projector)
    expected = torch.autograd.grad(projector(x).square().mean(), list(projector.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        out = projector(x)
    found = torch.autograd.grad(out.float().square().mean(), list(projector.parameters()))
    assert out.dtype == torch.bfloat16
    for gradient, reference in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        if reference.abs().max() > 1e-4:  # a shift of all keys of a region has no gradient but rounding
            assert F.cosine_similarity(gradient.flatten(), reference.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_around_it_changes_nothing(reentrant):
    projector = make().double()
    x = features(projector).double().requires_grad_()
    expected = torch.autograd.grad(projector(x).square().sum(), [x, *projector.parameters()])
    checkpoint(projector, x, use_reentrant=reentrant).square().sum().backward()
    for tensor, reference in zip([x, *projector.parameters()], expected, strict=True):
        torch.testing.assert_close(tensor.grad, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "model.mm_projector.", "mm_projector."])
def test_from_official_takes_weights_behind_a_prefix_and_reads_the_sizes(prefix):
    projector = make(grid=6, scale_factor=3).to(torch.bfloat16)
    weights = {prefix + key: value for key, value in projector.state_dict().items()}
    weights |= {"lm_head.weight": torch.zeros(2, 2)} if prefix else {}
    built = TokenPackerProjector.from_official(weights, grid=6, scale_factor=3, num_heads=4)
    assert (built.dim, built.hidden, built.num_levels) == (8, 12, 3)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, weights[prefix + key]) for key, value in built.state_dict().items())
    assert all(parameter.requires_grad for parameter in built.parameters())
    with torch.no_grad():
        built.mlp[0].weight.zero_()
    assert projector.mlp[0].weight.abs().sum() > 0, "the new module must not share the given weights"


def test_from_official_lists_what_is_missing_unexpected_or_misshapen():
    weights = make().state_dict()
    wrong = {key: value for key, value in weights.items() if key not in ("ln_k_1.bias", "mlp.2.weight")}
    with pytest.raises(CheckpointError, match=r"missing ln_k_1\.bias, mlp\.2\.weight; unexpected extra"):
        TokenPackerProjector.from_official(wrong | {"extra": torch.zeros(1)}, (4, 6), num_heads=4)
    with pytest.raises(CheckpointError, match=r"ln_v_1\.bias has shape \(3,\), expected \(16,\)"):
        TokenPackerProjector.from_official(weights | {"ln_v_1.bias": torch.zeros(3)}, (4, 6), num_heads=4)
    with pytest.raises(CheckpointError, match=r"missing .*q_proj_1\.weight.*; unexpected linear_1\.weight"):
        TokenPackerProjector.from_official({"linear_1.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"missing clip_attn\.in_proj_bias"):
        TokenPackerProjector.from_official({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_factor": 3}, r"scale_factor=3 doesn't divide the grid of 4 x 6 patches; scale factors that do: 2"),
        ({"grid": 5}, r"5 x 5 patches; scale factors that do: 5"),
        ({"scale_factor": 0}, "scale_factor must be at least 1, got 0"),
        ({"grid": (4, 6, 2)}, r"grid must be \(H, W\) or the side of a square, got \(4, 6, 2\)"),
        ({"num_levels": 0}, "num_levels must be at least 1, got 0"),
        ({"num_heads": 3}, "embed_dim must be divisible by num_heads, got 16 and 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenPackerProjector(**(SMALL | changes))


def test_sizes_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match=r"hidden must be an integer of at least 1, got 12\.0"):
        TokenPackerProjector(**(SMALL | {"hidden": 12.0}))


def test_features_of_another_shape_are_refused():
    projector = make()
    with pytest.raises(ValueError, match=r"features must be \(B, 24, 24\): the patches of a 4 x 6 grid without prefix"):
        projector(torch.zeros(2, 25, 24))
    with pytest.raises(ValueError, match=r"3 levels of 8 channels; got \(2, 24, 8\)"):
        projector(torch.zeros(2, 24, 8))
    with pytest.raises(ValueError, match=r"coarse must be \(2, 24, 8\), got \(1, 24, 8\)"):
        projector(torch.zeros(2, 24, 24), torch.zeros(1, 24, 8))


def test_a_fresh_projector_has_the_published_start_and_shows_its_settings():
    projector = TokenPackerProjector(**(SMALL | {"embed_dim": 256, "hidden": 256}))
    assert 0.018 < projector.mlp[2].weight.std() < 0.022 and projector.mlp[2].weight.abs().max() <= 2
    assert not projector.mlp[2].bias.any() and not projector.clip_attn.in_proj_bias.any()
    assert (projector.ln_q_1.weight == 1).all() and projector.ln_q_1.eps == 1e-6
    assert "grid=(4, 6), dim=8, hidden=256, scale_factor=2, num_levels=3" in repr(projector)
