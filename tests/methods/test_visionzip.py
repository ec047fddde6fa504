"""VisionZip: against published tokens, a naive twin, and at small budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from visual import cosines, exact_row, ranking, tower_tokens

from vltok.methods.pruning.tower import mix_tokens
from vltok.methods.pruning.visionzip import VisionZip, contextual_weights, dominant_and_targets

DATA = Path(__file__).parents[1] / "data"
SIZES = {"visionzip_b3_n24_k5_3": (5, 3), "visionzip_n576_k27_5": (27, 5), "visionzip_n576_k54_10": (54, 10)}


def naive(attention, keys, values, num_keep: int, num_targets: int, average: bool) -> tuple[list[int], torch.Tensor]:
    """Of one image without newlines: kept positions, ascending, and what stands there, float64."""
    dominant = ranking(attention)[: num_keep - num_targets]
    rest = [i for i in range(len(attention)) if i not in dominant]
    targets = rest[:: max(1, len(rest) // num_targets)][:num_targets] if num_targets else []
    cosine, values = cosines(keys), values.double()
    groups = {target: [] for target in targets}
    for i in rest:
        if i not in targets and targets:
            groups[max(targets, key=lambda target: (round(cosine[i, target].item(), 9), -target))].append(i)
    out = []
    for i in sorted(dominant + targets):
        own = [values[j] for j in groups.get(i, [])]
        if average:
            out.append(sum([values[i], *own]) / (1 + len(own)))
        else:
            out.append(values[i] + (sum(own) / len(own) if own else 0))
    return sorted(dominant + targets), torch.stack(out)


@pytest.mark.parametrize("name", SIZES)
def test_tokens_are_the_published_ones(name):
    golden = load_file(DATA / f"{name}.safetensors")
    dominant, targets = SIZES[name]  # [CLS] is one of the dominant tokens
    attention = golden["in.cls_row"].sum(1)
    attention[:, 0] = 2 * golden["in.cls_row"].shape[1]
    kept, is_target = dominant_and_targets(attention, dominant + targets, targets)
    assert torch.equal(kept[~is_target].view(len(kept), -1), golden["mid.dominant_raster"])
    assert torch.equal(kept[is_target].view(len(kept), -1), golden["mid.targets"])
    weights = contextual_weights(golden["in.metric"], attention, kept, is_target)
    for image, assigned in enumerate(golden["mid.assign"]):
        for place in range(len(assigned)):
            if assigned[place] >= 0 and place not in kept[image]:
                (slot,) = weights[image, :, place].nonzero()[:, 0].tolist()
                assert kept[image, slot] == golden["mid.targets"][image, assigned[place]]
    visual = replace(tower_tokens(), features=golden["in.hidden"].float())
    tokens = mix_tokens(visual, kept, weights).features
    released = torch.stack([torch.cat([own[~last], own[last]]) for own, last in zip(tokens, is_target, strict=True)])
    torch.testing.assert_close(released, golden["out.tokens"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("num_keep", "share"), [(1, 0.9), (2, 0.5), (12, 10 / 64), (13, 0.5), (59, 1.0), (60, 0.3)])
def test_tokens_are_those_of_the_naive_twin(average, num_keep, share):
    visual = tower_tokens()
    picked = VisionZip(num_keep=num_keep, contextual=share, average=average).select(visual, num_keep)
    metric = visual.keys.unflatten(2, (4, -1)).mean(2)  # over the heads
    for image in range(3):
        targets = min(round(share * num_keep), num_keep - 1)
        kept, values = naive(visual.attention[image], metric[image], visual.features[image], num_keep, targets, average)
        assert picked.indices[image].tolist() == kept
        torch.testing.assert_close(picked.features[image].double(), values, atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(exact_row, st.sampled_from([0.0, 0.25, 0.5])), min_size=1, max_size=30), data=st.data())
def test_ties_zero_keys_and_small_images_follow_the_definition_exactly(rows, data):
    keys = torch.tensor([key for key, _ in rows])
    attention = torch.tensor([score for _, score in rows])
    num_keep = data.draw(st.integers(1, len(rows)))
    targets = data.draw(st.integers(0, num_keep))
    kept, is_target = dominant_and_targets(attention[None], num_keep, targets)
    weights = contextual_weights(keys[None], attention[None], kept, is_target)
    values = torch.eye(len(rows))
    expected, tokens = naive(attention, keys, values, num_keep, targets, False)
    assert kept[0].tolist() == expected
    torch.testing.assert_close((weights[0] @ values).double(), tokens)


def test_a_target_and_the_mean_of_what_goes_there_by_hand():
    attention = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    keys = torch.tensor([[[9.0, 9], [1, 0], [2, 0.1], [0, 1], [0.1, 3], [5, 1]]])
    kept, is_target = dominant_and_targets(attention, 3, 2)
    assert kept.tolist() == [[0, 1, 3]]  # of the rest 1, 2, 3, 4, 5 every second
    assert is_target.tolist() == [[False, True, True]]
    assert contextual_weights(keys, attention, kept, is_target)[0].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0.5, 0, 0, 0.5],
        [0, 0, 0, 1, 1, 0],
    ]
    mean = contextual_weights(keys, attention, kept, is_target, True)[0]
    torch.testing.assert_close(mean[1] * 3, torch.tensor([0.0, 1, 1, 0, 0, 1]))
    assert mean[2].tolist() == [0, 0, 0, 0.5, 0.5, 0]


@pytest.mark.parametrize(("num_keep", "contextual"), [(1, 0), (3, 0), (4, 1), (32, 5), (64, 10), (128, 20), (192, 30)])
def test_the_default_splits_a_budget_as_published(num_keep, contextual):
    visual = tower_tokens(batch=1, length=400)
    picked = VisionZip(num_keep=num_keep).select(visual, num_keep)
    assert torch.equal(picked.indices, dominant_and_targets(visual.attention, num_keep, contextual)[0])


def test_keys_are_compared_by_their_mean_over_the_heads():
    visual = tower_tokens()
    apart = VisionZip(num_keep=12).select(replace(visual, num_heads=None), 12)
    mean = VisionZip(num_keep=12).select(visual, 12)
    averaged = replace(visual, keys=visual.keys.unflatten(2, (4, -1)).mean(2), num_heads=1)
    assert torch.equal(VisionZip(num_keep=12).select(averaged, 12).features, mean.features)
    assert not torch.equal(apart.features, mean.features)


def test_counts_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"num_targets must be in 0\.\.4 \(the kept tokens\), got 5"):
        dominant_and_targets(torch.rand(1, 9), 4, 5)
