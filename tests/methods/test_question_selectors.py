"""What every selector promises that picks in the language model's space, or with the question."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from visual import alone, made_up, repeated

from vltok.methods.pruning.cdpruner import CDPruner
from vltok.methods.pruning.dart import DART
from vltok.methods.pruning.mmtok import MMTok
from vltok.methods.pruning.otprune import OTPrune
from vltok.methods.pruning.vidcom2 import VidCom2

METHODS = [
    CDPruner(num_keep=5),
    CDPruner(num_keep=5, theta=None),
    CDPruner(num_keep=5, relevance="clip"),
    CDPruner(num_keep=5, relevance=None),
    MMTok(num_keep=5),
    DART(num_keep=5),
    DART(num_keep=5, text_pivots=0),
    OTPrune(num_keep=5),
    VidCom2(num_keep=5),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def assert_exact(kept: torch.Tensor, num_keep: int, length: int) -> None:
    assert kept.shape[1] == num_keep
    assert kept.dtype == torch.int64
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < length


@every_method
@pytest.mark.parametrize("length", [24, 66])
def test_rows_are_exact_ascending_and_as_alone(method, length):
    visual = made_up(length=length)
    for num_keep in (1, 2, 3, 5, 7, length // 2, length - 1, length):
        kept = method.select(visual, num_keep)
        assert_exact(kept, num_keep, length)
        for image in range(3):
            assert torch.equal(method.select(alone(visual, image), num_keep)[0], kept[image])
    assert len({tuple(row) for row in method.select(visual, length // 4).tolist()}) == 3


@every_method
def test_a_single_token_is_kept(method):
    assert method.select(made_up(length=1, frames=1), 1).tolist() == [[0]] * 3


@every_method
def test_an_empty_batch_is_fine(method):
    names = ("embeddings", "image_keys", "is_overview", "features", "text", "text_mask", "clip_image", "clip_text")
    visual = made_up()
    none = replace(visual, **{name: getattr(visual, name)[:0] for name in names})
    assert method.select(none, 5).shape == (0, 5)


@every_method
@pytest.mark.parametrize("num_keep", [4, 7, 20, 30])
def test_equal_and_zero_tokens_are_kept_once_each(method, num_keep):
    visual = repeated(made_up(length=30), [0, 1, 2, 3, 4] * 6)
    assert_exact(method.select(visual, num_keep), num_keep, 30)
    visual.embeddings[:, ::2] = 0
    visual.features[:, ::2] = 0
    visual.clip_image[:, ::2] = 0
    assert_exact(method.select(visual, num_keep), num_keep, 30)
    visual.embeddings[:] = 0
    assert_exact(method.select(visual, num_keep), num_keep, 30)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(method, dtype):
    visual = made_up(length=66)
    names = ("embeddings", "features", "text", "clip_image", "clip_text")
    half = replace(visual, **{name: getattr(visual, name).to(dtype) for name in names})
    single = replace(half, **{name: getattr(half, name).float() for name in names})
    assert torch.equal(method.select(half, 20), method.select(single, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.select(single, 20), method.select(half, 20))


@every_method
def test_tokens_that_need_gradients_stay_as_they_are(method):
    visual = made_up()
    expected = method.select(visual, 6)
    before = visual.embeddings.clone()
    for name in ("embeddings", "features", "text"):
        getattr(visual, name).requires_grad_()
    assert torch.equal(method.select(visual, 6), expected)
    assert torch.equal(visual.embeddings, before)


@every_method
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20])
@pytest.mark.parametrize("num_keep", [1, 12])
def test_unusable_embeddings_are_refused_with_the_image_named(method, value, num_keep):
    visual = made_up()
    visual.embeddings[1, 3, 2] = value
    with pytest.raises(ValueError, match=r"image \[1\].*NaN"):
        method.select(visual, num_keep)


@pytest.mark.parametrize("method", [CDPruner(num_keep=5), MMTok(num_keep=5)], ids=lambda method: method.name)
def test_a_question_without_a_word_is_refused(method):
    visual = made_up()
    visual.text_mask[1] = False
    with pytest.raises(ValueError, match=r"image \[1\] of the batch comes without a word .*; ask a question, or "):
        method.select(visual, 5)
    with pytest.raises(ValueError, match=r"give `text`, \(B, M, D\)"):
        method.select(replace(visual, text=None), 5)


@pytest.mark.parametrize("method", [CDPruner(num_keep=5), MMTok(num_keep=5), DART(num_keep=5)], ids=lambda m: m.name)
def test_words_that_are_nan_are_refused(method):
    visual = made_up()
    visual.text[2, 2, 0] = torch.nan
    assert visual.text_mask[2, 2]
    with pytest.raises(ValueError, match=r"text of image \[2\] of the batch holds NaN"):
        method.select(visual, 5)
