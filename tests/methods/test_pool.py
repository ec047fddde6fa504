"""Pool: against a naive twin, at the ends of what a budget may be, and in a model."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import batch, single
from reference import assert_close
from tiny import shared_model

from vltok import apply
from vltok.errors import UnsupportedInputError
from vltok.methods.pruning.pool import Pool, pool_grid, pool_shape
from vltok.visual import VisualTokens

SIDE = st.integers(1, 12)


def visual(tokens: torch.Tensor, grid: tuple[int, int, int] | None) -> VisualTokens:
    """Tokens, (B, N, D), as a selector gets them."""
    batch, length, _ = tokens.shape
    keys = torch.zeros(batch, dtype=torch.int64)
    return VisualTokens(tokens, keys, None, torch.ones(batch, length, dtype=torch.bool), grid)


def sharp(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spans(size: int, count: int) -> list[tuple[int, int]]:
    """Where each of so many cells begins and ends."""
    return [(math.floor(i * size / count), math.ceil((i + 1) * size / count)) for i in range(count)]


def naive(tokens: torch.Tensor, grid: tuple[int, int, int], cells: tuple[int, int, int]):
    """Cell by cell: the position of its middle, and the mean of its tokens."""
    table = tokens.double().view(*grid, -1)
    found = []
    for f in spans(grid[0], cells[0]):
        for r in spans(grid[1], cells[1]):
            for c in spans(grid[2], cells[2]):
                frame, row, column = ((begin + end - 1) // 2 for begin, end in (f, r, c))
                mean = table[slice(*f), slice(*r), slice(*c)].flatten(0, 2).mean(0)
                found.append(((frame * grid[1] + row) * grid[2] + column, mean))
    return [place for place, _ in found], torch.stack([mean for _, mean in found])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_cells_are_those_of_the_naive_twin(data):
    grid = data.draw(st.tuples(st.integers(1, 4), SIDE, SIDE))
    cells = tuple(data.draw(st.integers(1, size)) for size in grid)
    tokens = sharp(2, math.prod(grid), 5, seed=data.draw(st.integers(0, 99)))
    kept, means = pool_grid(tokens, grid, cells)
    for own, mean in zip(tokens, means, strict=True):
        places, expected = naive(own, grid, cells)
        assert kept.tolist() == places == sorted(set(places))
        torch.testing.assert_close(mean, expected.float(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=200)
@given(height=SIDE, width=SIDE, cells=st.integers(1, 200))
def test_no_shape_near_that_of_the_grid_has_more_cells(height, width, cells):
    def is_near(rows: int, columns: int) -> bool:
        return abs(rows - columns * height / width) <= 1 + 1e-9 or abs(columns - rows * width / height) <= 1 + 1e-9

    rows, columns = pool_shape((height, width), cells)
    near = [(s, t) for s in range(1, height + 1) for t in range(1, width + 1) if s * t <= cells and is_near(s, t)]
    assert (rows, columns) in near
    assert rows * columns == max(s * t for s, t in near)
    assert pool_shape((height, width), rows * columns) == (rows, columns)


def test_shapes_by_hand():
    assert pool_shape((24, 24), 64) == (8, 8)
    assert pool_shape((24, 24), 58) == (7, 8)
    assert pool_shape((27, 36), 192) == (12, 16)
    assert pool_shape((1, 50), 7) == (1, 7)
    assert pool_shape((24, 24), 1) == (1, 1)
    assert pool_shape((24, 24), 9999) == (24, 24)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_budget_is_never_exceeded_and_no_index_comes_twice(data):
    grid = data.draw(st.tuples(st.integers(1, 5), SIDE, SIDE))
    length = math.prod(grid) + data.draw(st.integers(0, 3))
    wanted = data.draw(st.integers(1, length))
    method = Pool(num_keep=wanted)
    count = method.budget(length, grid, "video")
    assert 1 <= count <= wanted
    tokens = sharp(2, length, 3)
    selection = method.pick(visual(tokens, grid), count)
    assert selection.indices.shape == (2, count) and selection.embeddings.shape == (2, count, 3)
    assert (
        selection.indices.diff(dim=1) > 0
    ).all() and 0 <= selection.indices.min() <= selection.indices.max() < length


def test_less_than_a_token_a_frame_averages_whole_frames():
    tokens = sharp(1, 24, 8)
    method = Pool(num_keep=2)
    selection = method.pick(visual(tokens, (4, 2, 3)), method.budget(24, (4, 2, 3), "video"))
    halves = tokens.view(2, 12, 8).mean(1)
    torch.testing.assert_close(selection.embeddings[0], halves)
    assert selection.indices.tolist() == [[1, 13]]  # of two frames the first, of two rows the upper one


def test_tokens_behind_the_grid_stay_and_count():
    tokens = sharp(1, 25, 8)
    method = Pool(num_keep=9)
    count = method.budget(25, (4, 2, 3), "video")
    assert count == 9  # two cells of each frame, and the one behind
    selection = method.pick(visual(tokens, (4, 2, 3)), count)
    assert selection.indices[0, -1] == 24
    assert torch.equal(selection.embeddings[0, -1], tokens[0, -1])
    assert Pool(num_keep=1).budget(25, (4, 2, 3), "video") == 1


def test_everything_kept_is_unchanged_and_one_cell_is_the_mean():
    tokens = sharp(3, 20, 8)
    kept, means = pool_grid(tokens, (1, 4, 5), (1, 4, 5))
    assert kept.tolist() == list(range(20)) and torch.equal(means, tokens)
    assert_close(pool_grid(tokens, (1, 4, 5), (1, 1, 1))[1][:, 0], tokens.mean(1))
    assert pool_grid(tokens[:, :1], (1, 1, 1), (1, 1, 1))[0].tolist() == [0]


def test_means_of_bfloat16_are_made_in_float32_and_rows_do_not_depend_on_the_batch():
    tokens = sharp(5, 63, 16).bfloat16()
    tokens[2] = 0
    _, means = pool_grid(tokens, (1, 7, 9), (1, 3, 4))
    assert means.dtype == torch.bfloat16
    assert torch.equal(means, pool_grid(tokens.float(), (1, 7, 9), (1, 3, 4))[1].bfloat16())
    for row in range(5):
        assert torch.equal(pool_grid(tokens[row : row + 1], (1, 7, 9), (1, 3, 4))[1][0], means[row])


def test_gradients_are_those_of_the_naive_twin():
    tokens, twin = (sharp(1, 12, 4).requires_grad_() for _ in range(2))
    weights = sharp(6, 4, seed=1)
    (pool_grid(tokens, (1, 3, 4), (1, 2, 3))[1][0] * weights).sum().backward()
    (naive(twin[0], (1, 3, 4), (1, 2, 3))[1] * weights).sum().backward()
    torch.testing.assert_close(tokens.grad, twin.grad)


def test_in_a_model_the_means_enter_the_language_model():
    family = tiny.LLAVA
    model, inputs = shared_model(family), single(family, "text around")
    seen = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    try:
        model(**inputs)
        with apply(model, Pool(num_keep=6)) as handle:
            model(**inputs)
            report = handle.report(file=None)
    finally:
        hook.remove()
    whole, pooled = seen
    visual_tokens = whole[(inputs["input_ids"][0] == 4)]
    kept, means = pool_grid(visual_tokens[None], (1, 4, 4), (1, 2, 3))
    assert report.keep_indices[0][0].tolist() == kept.tolist()
    before = int((inputs["input_ids"][0] == 4).nonzero()[0])
    assert_close(pooled[before : before + 6], means[0])


@pytest.mark.parametrize("family", [tiny.LLAVA, tiny.QWEN2_5_VL, tiny.INTERNVL], ids=lambda family: family.key)
def test_rows_of_a_batch_equal_the_rows_alone(family):
    model = shared_model(family)
    with apply(model, Pool(keep_ratio=0.4, per="tile")) as handle:
        names = ["two images", "text around"]
        together = model(**batch(family, names=names)).logits
        kept = handle.report(file=None).kept_tokens
        for row, name in enumerate(names):
            inputs = single(family, name)
            alone = model(**inputs).logits
            assert_close(together[row, -1], alone[0, -1])
            assert list(handle.report(file=None).kept_tokens[0]) == list(kept[row])


def test_frames_of_a_video_are_pooled_each_by_itself():
    family = tiny.QWEN2_5_VL  # two pairs of frames of 3 x 4 tokens
    model, inputs = shared_model(family), family.inputs(["w1 <video> w2"], videos=[tiny.clip(0, family.size)])
    with apply(model, Pool(keep_ratio=0.5)) as handle:
        model(**inputs)
        kept = handle.report(file=None).keep_indices[0][0]
    assert kept.tolist() == [
        frame * 12 + row * 4 + column for frame in (0, 1) for row in (0, 1) for column in (0, 1, 2)
    ]


@pytest.mark.parametrize("family", [tiny.LLAVA_NEXT, tiny.LLAVA_ONEVISION], ids=lambda family: family.key)
def test_without_a_grid_it_says_what_to_use(family):
    model = shared_model(family)
    with apply(model, Pool(keep_ratio=0.5)), pytest.raises(UnsupportedInputError, match="use another method, such as"):
        model(**single(family, "text around"))


def test_what_it_does_by_itself_is_refused():
    for name, value in (("merge", "nearest"), ("regions", (2, 2))):
        with pytest.raises(ValueError, match=f"leave out {name}"):
            Pool(keep_ratio=0.5, **{name: value})
    with pytest.raises(UnsupportedInputError, match="AnyRes"):
        Pool(keep_ratio=0.5).budget(20, None, "image")
    with pytest.raises(ValueError, match=r"has no 13 cells; ask Pool\.budget"):
        Pool(num_keep=13).select(visual(sharp(1, 24, 4), (1, 4, 6)), 13)
    with pytest.raises(ValueError, match="exactly one of keep_ratio and num_keep"):
        Pool()
