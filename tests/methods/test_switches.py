"""Switches that go with every selector: merging what is dropped, and regions with equal shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from visual import only, tower_tokens

import vltok
from vltok.errors import UnsupportedInputError
from vltok.methods.pruning.correction import standardised
from vltok.methods.pruning.merging import merge_into_kept, nearest_kept
from vltok.methods.pruning.regions import part_of, region_quotas
from vltok.tokens import gather_tokens
from vltok.visual import Selection, VisualTokens


def visual(grid=(1, 6, 8), behind: int = 0, batch: int = 2) -> VisualTokens:
    frames, height, width = grid
    inside = frames * height * width
    generator = torch.Generator().manual_seed(3)
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
    places = torch.cat([places, -torch.ones(behind, 3, dtype=torch.long)])
    return VisualTokens(
        embeddings=torch.randn(batch, inside + behind, 16, generator=generator),
        image_keys=torch.arange(batch),
        attention=torch.rand(batch, inside + behind, generator=generator),
        is_overview=torch.ones(batch, inside + behind, dtype=torch.bool),
        grid=grid,
        coordinates=places.expand(batch, -1, -1),
    )


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_shares_are_equal_as_far_as_regions_go(sizes, data):
    num_keep = data.draw(st.integers(1, sum(sizes)))
    quotas = region_quotas(sizes, num_keep)
    assert sum(quotas) == num_keep
    assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))
    open_ones = [quota for quota, size in zip(quotas, sizes, strict=True) if quota < size]
    assert not open_ones or max(quotas) - min(open_ones) <= 1


@pytest.mark.parametrize("method", [vltok.DivPrune, vltok.FasterVLM, vltok.StrideTokens])
def test_each_region_is_asked_alone(method):
    tokens = visual()
    kept = method(num_keep=8, regions=(2, 2)).pick(tokens, 8).indices
    for row in range(2):
        expected = []
        for top in (0, 3):
            for left in (0, 4):
                own = [y * 8 + x for y in range(top, top + 3) for x in range(left, left + 4)]
                part = VisualTokens(
                    tokens.embeddings[row : row + 1, own],
                    tokens.image_keys[row : row + 1],
                    tokens.attention[row : row + 1, own],
                    tokens.is_overview[row : row + 1, own],
                )
                expected += [own[place] for place in method(num_keep=8).select(part, 2)[0].tolist()]
        assert kept[row].tolist() == sorted(expected)


def test_frames_are_cut_alike_and_tokens_behind_the_grid_are_in_the_last_region():
    kept = vltok.StrideTokens(num_keep=4, regions=(1, 2)).pick(visual((2, 2, 2), behind=1), 4).indices[0]
    assert kept.tolist() == [0, 1, 4, 5]
    kept = vltok.FasterVLM(num_keep=9, regions=(2, 2)).pick(visual((2, 2, 2), behind=1), 9).indices[0]
    assert kept.tolist() == list(range(9))


def test_more_regions_than_rows_are_as_many_as_there_are_rows():
    tokens = visual((1, 2, 3))
    assert torch.equal(
        vltok.DivPrune(num_keep=4, regions=(9, 9)).pick(tokens, 4).indices,
        vltok.DivPrune(num_keep=4, regions=(2, 3)).pick(tokens, 4).indices,
    )


def test_regions_need_a_grid():
    with pytest.raises(UnsupportedInputError, match="form no grid"):
        vltok.DivPrune(num_keep=4, regions=(2, 2)).pick(replace(visual(), grid=None, coordinates=None), 4)
    for wrong in (3, (1,), (0, 2), (1.5, 2)):
        with pytest.raises((TypeError, ValueError), match="regions must be"):
            vltok.DivPrune(num_keep=4, regions=wrong)
    with pytest.raises(ValueError, match="merge must be one of None, 'nearest'"):
        vltok.DivPrune(num_keep=4, merge="mean")
    for method in (vltok.VisionZip, vltok.PruMergePlus):
        with pytest.raises(ValueError, match="merges tokens by itself; leave out merge='nearest'"):
            method(num_keep=4, merge="nearest")


def test_a_region_that_is_not_changed_keeps_its_tokens_beside_those_that_are():
    class Doubling(vltok.StrideTokens):
        """Doubles what it keeps, but leaves whole regions as they are."""

        merges = True

        def select(self, visual, num_keep):
            indices = super().select(visual, num_keep)
            if num_keep == visual.embeddings.shape[1]:
                return indices
            return Selection(indices, 2 * gather_tokens(visual.embeddings, indices))

    for tokens, num_keep, doubled in (
        (visual((1, 1, 5)), 4, slice(0, 2)),
        (visual((1, 1, 4), behind=3), 5, slice(2, 5)),
    ):
        selection = Doubling(num_keep=num_keep, regions=(1, 2)).pick(tokens, num_keep)
        expected = gather_tokens(tokens.embeddings, selection.indices)
        expected[:, doubled] *= 2
        assert torch.equal(selection.embeddings, expected)


def test_dropped_tokens_go_to_the_kept_one_that_is_most_like_them():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [0.0, 0.0], [0.1, 1.0]]])
    kept = torch.tensor([[0, 1]])
    assert nearest_kept(tokens, kept).tolist() == [[0, 1, 0, 0, 1]]  # a zero is as like to all: the first
    expected = torch.stack([tokens[0, [0, 2, 3]].mean(0), tokens[0, [1, 4]].mean(0)])
    torch.testing.assert_close(merge_into_kept(tokens, kept)[0], expected)
    everything = torch.arange(5).unsqueeze(0)
    assert torch.equal(merge_into_kept(tokens, everything), tokens)


def test_gradients_reach_every_token_that_was_merged():
    tokens = torch.randn(2, 9, 4, requires_grad=True)
    merge_into_kept(tokens, torch.tensor([[0, 4], [3, 8]])).square().sum().backward()
    assert (tokens.grad.abs().amax(-1) > 0).all()
    half = merge_into_kept(tokens.detach().bfloat16(), torch.tensor([[0, 4], [3, 8]]))
    assert half.dtype == torch.bfloat16


def naive_centred(tokens: torch.Tensor, num_keep: int, first: int | None, score) -> list[int]:
    """Greedy picks of one image by weighted distances of centred tokens, with plain loops."""
    x = tokens.double()
    mean = x.mean(0)
    weight = [float(1 - torch.cosine_similarity(each, mean, dim=0)) for each in x]
    cosine = torch.nn.functional.normalize(x - mean, dim=-1)
    cosine = cosine @ cosine.T
    if first is None:
        others = [[float(1 - cosine[i, j]) for j in range(len(x)) if j != i] for i in range(len(x))]
        first = max(range(len(x)), key=lambda i: (weight[i] * min(others[i]), -i))
    picks = [first]
    while len(picks) < num_keep:
        left = [i for i in range(len(x)) if i not in picks]
        far = {i: weight[i] * score([float(1 - cosine[i, j]) for j in picks]) for i in left}
        picks.append(max(left, key=lambda i: (far[i], -i)))
    return sorted(picks)


def naive_standardised(features: torch.Tensor, num_keep: int, first: int | None, score) -> list[int]:
    """The same of an image's features, channel by channel divided by its standard deviation over the patches alone."""
    patches = [i for i, token in enumerate(features) if token.abs().max() > 0]
    if num_keep >= len(patches):
        others = [i for i in range(len(features)) if i not in patches]
        return sorted([*patches, *others[: num_keep - len(patches)]])
    columns = []
    for column in features[patches].double().T:
        variance = float(((column - column.mean()) ** 2).mean())
        columns.append(torch.zeros_like(column) if column.min() == column.max() else column / variance**0.5)
    picks = naive_centred(torch.stack(columns, 1), num_keep, None if first is None else patches.index(first), score)
    return [patches[i] for i in picks]


@pytest.mark.parametrize("length", [12, 40])
def test_centred_similarity_goes_with_distinctness(length):
    generator = torch.Generator().manual_seed(5)
    common = 8 * torch.randn(24, generator=generator)
    tokens = replace(visual(), embeddings=common + torch.randn(3, length, 24, generator=generator), attention=None)
    tokens = replace(tokens, is_overview=torch.ones(3, length, dtype=torch.bool), grid=None, coordinates=None)
    for method, score in (
        (vltok.DivPrune(num_keep=7, correction="centred"), min),
        (vltok.ToDRE(num_keep=7, stages=(1,), pivot="farthest", correction="centred"), sum),
        (vltok.ToDRE(num_keep=7, stages=(1,), pivot="farthest", strategy="k_center", correction="centred"), min),
    ):
        picks = method.select(tokens, 7)
        plain = replace(method, correction=None).select(tokens, 7)
        assert not torch.equal(picks, plain)
        for row, own in enumerate(tokens.embeddings):
            cosines = torch.cosine_similarity(own, torch.nn.functional.normalize(own, dim=-1).mean(0), dim=-1)
            first = None if isinstance(method, vltok.DivPrune) else int(cosines.argmin())
            assert picks[row].tolist() == naive_centred(own, 7, first, score)
    with pytest.raises(ValueError, match="correction must be one of None, 'centred', 'standardised'"):
        vltok.DivPrune(num_keep=7, correction="centered")


BY_FEATURES = [
    (vltok.DivPrune(num_keep=9, correction="standardised"), min),
    (vltok.ToDRE(num_keep=9, stages=(1,), pivot="farthest", correction="standardised"), sum),
    (vltok.ToDRE(num_keep=9, stages=(1,), pivot="farthest", strategy="k_center", correction="standardised"), min),
]
by_features = pytest.mark.parametrize(("method", "score"), BY_FEATURES, ids=repr)


def first_of(method: vltok.Selector, embeddings: torch.Tensor, among: list[int]) -> int | None:
    """What ToDRE starts from: of some tokens, (N, D), the one least like the mean of their directions."""
    if isinstance(method, vltok.DivPrune):
        return None
    mean = torch.nn.functional.normalize(embeddings[among].double(), dim=-1).mean(0)
    return min(among, key=lambda i: float(torch.cosine_similarity(embeddings[i].double(), mean, dim=0)))


def huge(tokens: VisualTokens) -> VisualTokens:
    """The same with features of which two channels are huge and one constant, wherever there is a patch."""
    features = tokens.features.clone()
    patch = features.abs().amax(-1, keepdim=True) > 0
    features[..., 3] *= 1e4
    features[..., 5] = 700 + features[..., 5]
    features[..., 7] = 0.1
    return replace(tokens, features=torch.where(patch, features, 0.0))


@by_features
@pytest.mark.parametrize("newline", [0, 6])
@pytest.mark.parametrize("num_keep", [1, 9, 45])
def test_standardised_features_decide_whatever_the_size_of_their_channels(method, score, newline, num_keep):
    tokens = huge(tower_tokens(newline=newline, length=48))
    method = replace(method, num_keep=num_keep)
    picks = method.select(tokens, num_keep)
    for image, own in enumerate(tokens.features):
        among = [i for i, token in enumerate(own) if token.any()]
        first = first_of(method, tokens.embeddings[image], among)
        assert picks[image].tolist() == naive_standardised(own, num_keep, first, score)
        assert torch.equal(method.select(only(tokens, image), num_keep)[0], picks[image])
    scaled = replace(
        tokens, features=tokens.features * torch.logspace(-3, 3, 24, base=2).round(decimals=0).clamp_min(1)
    )
    assert num_keep != 9 or not torch.equal(replace(method, correction=None).select(tokens, 9), picks)
    assert torch.equal(method.select(scaled, num_keep), picks)


@by_features
def test_standardised_similarity_is_of_each_region_alone(method, score):
    plain = visual()
    tokens = huge(
        replace(tower_tokens(length=48), grid=plain.grid, coordinates=plain.coordinates[:1].expand(3, -1, -1))
    )
    picks = replace(method, regions=(2, 2), num_keep=20).pick(tokens, 20).indices
    for image, own in enumerate(tokens.features):
        expected = []
        for top in (0, 3):
            for left in (0, 4):
                part = [y * 8 + x for y in range(top, top + 3) for x in range(left, left + 4)]
                embeddings = tokens.embeddings[image, part]
                first = first_of(method, embeddings, list(range(12)))
                expected += [part[i] for i in naive_standardised(own[part], 5, first, score)]
        assert picks[image].tolist() == sorted(expected)


@by_features
def test_dropped_tokens_are_merged_as_they_enter_the_language_model(method, score):
    tokens = tower_tokens(newline=6)
    indices = method.pick(tokens, 9).indices
    merged = replace(method, merge="nearest").pick(tokens, 9)
    assert torch.equal(merged.indices, indices)
    assert torch.equal(merged.embeddings, merge_into_kept(tokens.embeddings, indices))


@by_features
def test_features_must_be_there_and_be_numbers(method, score):
    tokens = tower_tokens(newline=6)
    assert method.needs == ("features",) and replace(method, correction="centred").needs == ()
    with pytest.raises(ValueError, match=r'correction="standardised" needs the vision tower\'s features'):
        method.select(replace(tokens, features=None), 9)
    for name in ("features", "embeddings"):
        for value in (torch.nan, torch.inf, 1e30):
            broken = getattr(tokens, name).clone()
            broken[1, 7, 2] = value
            for num_keep in (9, 58):
                with pytest.raises(ValueError, match=r"of image \[1\] of the batch hold NaN"):
                    method.select(replace(tokens, **{name: broken}), num_keep)
    for num_keep in (0, 61):
        with pytest.raises(ValueError, match=r"num_keep must be in 1\.\.60"):
            method.select(tokens, num_keep)
    assert method.select(only(tokens), 9).shape == (0, 9)


@by_features
def test_tokens_that_are_alike_in_all_channels_are_taken_by_the_lowest_index(method, score):
    tokens = tower_tokens(length=20)
    own = {name: getattr(tokens, name)[:, :1].expand(-1, 20, -1) for name in ("features", "embeddings")}
    for alike in (replace(tokens, **own), replace(tokens, features=torch.zeros_like(tokens.features))):
        assert method.select(alike, 9).tolist() == [list(range(9))] * 3


@pytest.mark.parametrize("value", [0.1, 700.1, -7.7])
def test_a_constant_channel_is_nothing_once_standardised(value):
    """Even where a mean of equal numbers is off by a rounding, as that of a single channel is."""
    rest, distinct = standardised(torch.full((2, 12, 1), value))
    assert torch.equal(rest, torch.zeros(2, 12, 1)) and torch.equal(distinct, torch.zeros(2, 12))
    varied = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    rest, _ = standardised(varied)
    torch.testing.assert_close(rest.mean(1), torch.zeros(2, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(rest.square().mean(1), torch.ones(2, 5))


def test_regions_are_shown_all_that_is_known_of_their_tokens():
    """Each field of `VisualTokens` is cut, or is of the image as a whole."""
    tokens = visual((1, 4, 4))
    whole = {"image_keys", "grid", "can_project", "num_heads", "text", "text_mask", "clip_text"}
    given = {name: torch.randn(2, 16, 16) for name in vars(tokens).keys() - whole - {"coordinates", "is_overview"}}
    of_image = {"text": torch.randn(2, 16, 3), "text_mask": torch.ones(2, 16).bool(), "clip_text": torch.randn(2, 16)}
    tokens, where = replace(tokens, **given, **of_image), torch.tensor([1, 5, 6])
    part = part_of(tokens, where)
    for name, value in vars(tokens).items():
        if name in whole - {"grid"}:
            assert getattr(part, name) is value
        elif name != "grid":
            assert torch.equal(getattr(part, name), value[:, where])
    assert part.grid is None
