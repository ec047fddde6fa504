"""What all selectors promise that look at the vision tower: budgets, ties, batches, precision, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from visual import only, tower_tokens

from vltok.method import Method
from vltok.methods.pruning.holov import HoloV
from vltok.methods.pruning.prumerge import PruMergePlus
from vltok.methods.pruning.scope import SCOPE
from vltok.methods.pruning.visionzip import VisionZip
from vltok.methods.pruning.vispruner import VisPruner
from vltok.visual import AttentionRequest, Selection, VisualTokens

METHODS = [
    VisionZip(num_keep=8),
    VisionZip(num_keep=8, contextual=0.5, average=True),
    SCOPE(num_keep=8),
    SCOPE(num_keep=8, alpha=0.0),
    VisPruner(num_keep=8),
    VisPruner(num_keep=8, important=0.0),
    HoloV(num_keep=8),
    HoloV(num_keep=8, crops=7),
    PruMergePlus(num_keep=8),
    PruMergePlus(num_keep=8, attended=1.0, num_neighbours=3),
]
every = pytest.mark.parametrize("method", METHODS, ids=repr)
merging = pytest.mark.parametrize("method", [each for each in METHODS if each.merges], ids=repr)


def indices(picked: torch.Tensor | Selection) -> torch.Tensor:
    return picked if isinstance(picked, torch.Tensor) else picked.indices


def values(picked: torch.Tensor | Selection) -> torch.Tensor | None:
    return None if isinstance(picked, torch.Tensor) else picked.features


@every
@pytest.mark.parametrize("length", [1, 2, 17, 60])
@pytest.mark.parametrize("newline", [0, 6])
def test_exactly_as_many_as_asked_each_once_ascending_and_each_image_for_itself(method, length, newline):
    visual = tower_tokens(length=length, newline=newline)
    for num_keep in sorted({1, 2, min(length, 9), max(1, length - 1), length}):
        num_keep = min(num_keep, length)
        picked = method.select(visual, num_keep)
        kept = indices(picked)
        assert kept.shape == (3, num_keep) and kept.dtype == torch.int64
        assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < length
        for image in range(3):
            alone = method.select(only(visual, image), num_keep)
            assert torch.equal(indices(alone)[0], kept[image])
            if method.merges:
                assert values(picked).dtype == visual.features.dtype
                assert torch.equal(values(alone)[0], values(picked)[image])
                assert values(picked)[image].norm(dim=1).count_nonzero() == (kept[image] % 6 != 5).sum() or not newline


@every
def test_images_get_picks_of_their_own(method):
    kept = indices(method.select(tower_tokens(), 12))
    assert len({tuple(row) for row in kept.tolist()}) == 3
    assert torch.equal(indices(method.select(only(tower_tokens(), 2, 0, 1), 12)), kept[[2, 0, 1]])


@every
def test_tokens_of_no_patch_come_last_and_do_not_change_the_others(method):
    visual = tower_tokens(newline=6)
    patches = (visual.attention[0] > -torch.inf).nonzero().squeeze(1)
    without = replace(visual, **{name: getattr(visual, name)[:, patches] for name in ("features", "keys", "attention")})
    picked, bare = method.select(visual, 12), method.select(without, 12)
    assert torch.equal(indices(picked), patches[indices(bare)])
    if method.merges:
        torch.testing.assert_close(values(picked), values(bare))
    for num_keep in (50, 51, 55):  # of 50 patches and 10 newlines, at 5, 11, ...
        kept = indices(method.select(visual, num_keep))
        expected = sorted([*patches.tolist(), *range(5, 60, 6)][:num_keep])
        assert kept.tolist() == [expected] * 3


@every
def test_equal_tokens_are_taken_by_the_lowest_index(method):
    visual = tower_tokens(batch=2, length=40)
    equal = replace(
        visual,
        **{name: getattr(visual, name)[:, :1].repeat(1, 40, 1) for name in ("features", "keys")},
        attention=torch.full((2, 40), 1 / 64),
    )
    kept = indices(method.select(equal, 12))
    shuffled = replace(equal, features=equal.features.clone())
    assert torch.equal(indices(method.select(shuffled, 12)), kept)
    assert kept[0, 0] == 0 and torch.equal(kept[0], kept[1])


@every
@pytest.mark.parametrize("zero", ["features", "keys", "attention"])
def test_zero_rows_do_no_harm(method, zero):
    visual = tower_tokens()
    one = getattr(visual, zero).clone()
    one[:, 3:9] = 0
    for some in (one, torch.zeros_like(one)):
        picked = method.select(replace(visual, **{zero: some}), 12)
        kept = indices(picked)
        assert kept.shape == (3, 12) and (kept.diff(dim=1) > 0).all()
        assert not method.merges or values(picked).isfinite().all()


@every
def test_similarity_is_float32_whatever_the_dtype_and_the_setting(method):
    visual = tower_tokens(length=300, width=64)
    half = replace(visual, features=visual.features.bfloat16(), keys=visual.keys.bfloat16())
    wide = replace(visual, features=half.features.float(), keys=half.keys.float())
    expected = indices(method.select(wide, 60))
    picked = method.select(half, 60)
    assert torch.equal(indices(picked), expected)
    if method.merges:
        assert values(picked).dtype == torch.bfloat16
        assert torch.equal(values(picked), values(method.select(wide, 60)).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(indices(method.select(wide, 60)), expected)


@every
def test_the_number_of_heads_behind_the_mean_does_not_matter(method):
    visual = tower_tokens()
    summed = replace(visual, attention=visual.attention * 16)
    picked, other = method.select(visual, 12), method.select(summed, 12)
    assert torch.equal(indices(picked), indices(other))
    assert not method.merges or torch.equal(values(picked), values(other))


@every
def test_it_asks_for_the_last_layer_but_one_and_is_known_by_name(method):
    assert method.attention_request(True) == AttentionRequest("cls", -2)
    assert method.attention_request(False) == AttentionRequest("received", -2)
    assert Method.from_dict(method.to_dict()) == method


@every
def test_nothing_is_written_to_and_inference_mode_is_fine(method):
    visual = tower_tokens()
    before = {name: value.clone() for name, value in vars(visual).items() if isinstance(value, torch.Tensor)}
    kept = indices(method.select(visual, 12))
    assert all(torch.equal(getattr(visual, name), value) for name, value in before.items())
    with torch.inference_mode():
        assert torch.equal(indices(method.select(visual, 12)), kept)


@every
def test_an_empty_batch_is_fine(method):
    picked = method.select(only(tower_tokens()), 12)
    assert indices(picked).shape == (0, 12) and indices(picked).dtype == torch.int64
    assert not method.merges or values(picked).shape == (0, 12, 24)


# Merging


@merging
def test_tokens_are_merged_before_the_projector_or_else_behind_it(method):
    visual = tower_tokens()
    before, behind = method.select(visual, 12), method.select(replace(visual, can_project=False), 12)
    assert before.embeddings is None and behind.features is None
    assert torch.equal(before.indices, behind.indices)
    matrix = torch.randn(24, 48, generator=torch.Generator().manual_seed(0))  # sums pass through a linear projector
    linear = replace(visual, can_project=False, embeddings=visual.features @ matrix)
    torch.testing.assert_close(method.select(linear, 12).embeddings, before.features @ matrix, atol=1e-4, rtol=1e-4)


@merging
@pytest.mark.parametrize("can_project", [True, False])
def test_gradients_flow_to_what_is_merged_and_to_nothing_else(method, can_project):
    visual = replace(tower_tokens(), can_project=can_project)
    leaves = {
        name: getattr(visual, name).clone().requires_grad_() for name in ("features", "keys", "embeddings", "attention")
    }
    picked = method.select(replace(visual, **leaves), 12)
    merged, source = (picked.features, "features") if can_project else (picked.embeddings, "embeddings")
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(merged.shape, generator=generator)
    (merged * cotangent).sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [source]
    shift = torch.randn(leaves[source].shape, generator=generator)
    moved = method.select(replace(visual, **{source: getattr(visual, source) + shift}), 12)
    moved = moved.features if can_project else moved.embeddings
    change, expected = ((moved - merged) * cotangent).sum(), (leaves[source].grad * shift).sum()  # sums are linear
    torch.testing.assert_close(change, expected, atol=1e-3, rtol=1e-4)


# Refusals


@every
def test_unusable_input_is_refused(method):
    visual = tower_tokens()
    for num_keep in (0, 61):
        with pytest.raises(ValueError, match=rf"num_keep must be in 1\.\.60 .* got {num_keep}|num_\w+ must be in 0"):
            method.select(visual, num_keep)
    for name in ("attention", *method.needs):
        if (name, method.merges) != ("features", True):
            with pytest.raises(ValueError, match=f"needs the vision tower's {name}; give `{name}`"):
                method.select(replace(visual, **{name: None}), 12)
    for value in (torch.nan, torch.inf):
        for name in ("attention", *method.needs):
            broken = getattr(visual, name).clone()
            broken[1, 7] = value
            with pytest.raises(ValueError, match=r"NaN|infinite"):
                method.select(replace(visual, **{name: broken}), 12)


def test_features_to_merge_must_be_there():
    visual: VisualTokens = replace(tower_tokens(), features=None)
    with pytest.raises(ValueError, match="give `features`"):
        VisionZip(num_keep=3).select(visual, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VisionZip(num_keep=1, contextual=1.5), r"contextual must be a share in 0\.\.1, got 1\.5"),
        (lambda: VisionZip(num_keep=1, contextual=True), "contextual must be a share"),
        (lambda: SCOPE(num_keep=1, alpha=-1), "alpha must be a number of at least 0, got -1"),
        (lambda: VisPruner(num_keep=1, important="half"), "important must be a share"),
        (lambda: HoloV(num_keep=1, crops=0), "crops must be at least 1, got 0"),
        (lambda: PruMergePlus(num_keep=1, attended=-0.1), "attended must be a share"),
        (lambda: PruMergePlus(num_keep=1, num_neighbours=-1), "num_neighbours must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_average_is_yes_or_no():
    with pytest.raises(TypeError, match="average must be True or False, got 'mean'"):
        VisionZip(num_keep=1, average="mean")
