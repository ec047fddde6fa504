"""Rules inside the decoder: published picks, naive twins, ties, budgets, and what a rule asks of a state."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import vltok
from vltok.methods.pruning.dart_decoder import select_unlike
from vltok.methods.pruning.fastv import regions_of
from vltok.methods.pruning.ranking import keep_top, of_tokens, rank_within
from vltok.methods.pruning.rule import RuleInStages
from vltok.methods.pruning.sparsevlm import choose_raters, rater_scores
from vltok.visual import Entry

DATA = Path(__file__).parents[1] / "data"


def images_at(length: int, *spans: tuple[int, int]) -> torch.Tensor:
    """The images of a row, (1, S): each from one slot up to another."""
    images = torch.full((1, length), -1)
    for number, (begin, end) in enumerate(spans):
        images[0, begin:end] = number
    return images


def random_rows(seed: int, rows: int, length: int, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of a few values, images among words and regions of them, (N, S) each."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (rows, length), generator=generator) / levels
    images = torch.randint(-1, 3, (rows, length), generator=generator)
    return scores, images, torch.randint(0, 4, (rows, length), generator=generator)


# Ranking


def naive_top(scores: list[float], images: list[int], budgets: list[int], regions: list[int]) -> list[bool]:
    """Image by image: regions take turns, each with its best token, until the budget is spent."""
    keep = [image < 0 for image in images]
    for image, budget in enumerate(budgets):
        queues = {}
        for place in sorted(range(len(scores)), key=lambda p: (-scores[p], p)):
            if images[place] == image:
                queues.setdefault(regions[place], []).append(place)
        while any(queues.values()) and budget > 0:
            heads = sorted((queue.pop(0) for queue in queues.values() if queue), key=lambda p: (-scores[p], p))
            for place in heads[:budget]:
                keep[place] = True
            budget -= len(heads)
    return keep


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**20), st.integers(1, 30), st.sampled_from([1, 3, 10**6]), st.booleans())
def test_the_kept_tokens_are_those_of_the_naive_twin(seed, length, levels, has_regions):
    scores, images, regions = random_rows(seed, 2, length, levels)
    budgets = [[1, 4, 2], [3, 1]]
    images[1][images[1] == 2] = -1  # the second row has two images
    keep = keep_top(scores, images, budgets, regions if has_regions else None)
    regions = regions if has_regions else torch.zeros_like(regions)
    for row, budget in enumerate(budgets):
        given = [each[row].tolist() for each in (scores, images, regions)]
        assert keep[row].tolist() == naive_top(given[0], given[1], budget, given[2])
        for image, number in enumerate(budget):
            own = images[row] == image
            assert int((keep[row] & own).sum()) == min(number, int(own.sum()))
        if has_regions:
            alone = keep_top(scores[row : row + 1], images[row : row + 1], [budget], regions[row : row + 1])
            assert torch.equal(alone[0], keep[row])


def test_equal_scores_go_to_the_lowest_index():
    keep = keep_top(torch.ones(1, 9), images_at(9, (1, 5), (6, 9)), [[2, 1]])
    assert keep[0].tolist() == [True, True, True, False, False, True, True, False, False]


def test_regions_get_equal_shares_and_hand_on_what_they_can_not_use():
    images = images_at(10, (0, 10))
    regions = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    scores = torch.arange(10.0).unsqueeze(0)
    kept = [keep_top(scores, images, [[k]], regions)[0].nonzero().squeeze(1).tolist() for k in (3, 4, 7)]
    assert kept == [[0, 4, 9], [0, 4, 8, 9], [0, 2, 3, 4, 7, 8, 9]]


def test_a_nan_is_refused_where_it_would_rank_a_token():
    scores = torch.tensor([[torch.nan, 1.0, 2.0]])
    assert keep_top(scores, torch.tensor([[-1, 0, 0]]), [[1]]).tolist() == [[True, False, True]]
    with pytest.raises(ValueError, match="NaN"):
        keep_top(scores, torch.tensor([[0, 0, 0]]), [[1]])


def test_places_within_groups():
    groups, order = torch.tensor([[1, 0, 1, 0, 1]]), torch.tensor([[4, 3, 0, 2, 1]])
    assert rank_within(groups, order).tolist() == [[1, 1, 2, 0, 0]]
    assert of_tokens([[5, 6], []], torch.tensor([[1, 0, 1], [-1, -1, -1]]))[0].tolist() == [6, 5, 6]


# FastV and PyramidDrop


@pytest.mark.parametrize(
    ("name", "begin", "length", "keep"), [("fastv_l40_n24_k6", 5, 24, 6), ("fastv_l652_n576_k288", 35, 576, 288)]
)
def test_fastv_keeps_what_the_released_code_keeps(name, begin, length, keep):
    golden = load_file(DATA / f"{name}.safetensors")
    row = golden["in.last_row"].mean(0, keepdim=True)
    kept = keep_top(row, images_at(row.shape[1], (begin, begin + length)), [[keep]])
    assert torch.equal(kept[0].nonzero().squeeze(1), golden["out.kept"])


def last_row(golden: dict[str, torch.Tensor], sample: int, heads: int, query: int) -> torch.Tensor:
    """The attention of one token of a Llama layer, mean over the heads, (S,), by the definition in float64."""
    x, wq, wk, norm = (golden[f"in.{name}"].double() for name in ("x", "wq", "wk", "ln"))
    x = x[sample]
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
    query_key = [(x @ weight.T).unflatten(-1, (heads, -1)).transpose(0, 1) for weight in (wq, wk)]  # (H, S, d)
    half = query_key[0].shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos(), angles.sin()
    turned = [
        torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        for a, b in (each.split(half, dim=-1) for each in query_key)
    ]
    seen = golden["in.mask"][sample] & (torch.arange(len(x)) <= query)
    logits = (turned[1] @ turned[0][:, query].unsqueeze(-1)).squeeze(-1) / (2 * half) ** 0.5
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)


@pytest.mark.parametrize(
    ("name", "heads", "starts", "entered", "words", "stage"),
    [
        ("pdrop_stage0_b3", 4, [5, None, 9], [48, 0, 48], [20, 18, 25], 0),
        ("pdrop_stage1_n576", 4, [35], [576], [60], 1),
    ],
)
def test_pyramid_drop_keeps_what_the_released_code_keeps(name, heads, starts, entered, words, stage):
    golden, method = load_file(DATA / f"{name}.safetensors"), vltok.PyramidDrop()
    for sample, (start, count, others) in enumerate(zip(starts, entered, words, strict=True)):
        expected = golden["out.kept"][sample]
        expected = expected[expected >= 0].tolist()
        if start is None:
            assert expected == list(range(others))
            continue
        now = int(count * [1.0, *method.ratios][stage])
        length = int(golden["in.mask"][sample].sum())  # an answer may stand behind the prompt
        row = last_row(golden, sample, heads, others + now - 1)[None, :length]
        images = images_at(length, (start, start + now))
        state = SimpleNamespace(
            layer=8 * (stage + 1),
            num_layers=32,
            images=images,
            image_lengths=[[count]],
            last=torch.tensor([others + now - 1]),
            attention=lambda queries, row=row: row.unsqueeze(1),
        )
        assert method.keep(state)[0].nonzero().squeeze(1).tolist() == expected


def test_budgets_are_shares_of_what_entered_at_every_layer():
    state = SimpleNamespace(image_lengths=[[75, 1], [576]], num_layers=32, layer=0)
    counts = []
    for layer in (8, 16, 24):
        state.layer = layer
        counts.append(vltok.PyramidDrop().budgets(state))
    assert counts == [[[37, 1], [288]], [[18, 1], [144]], [[9, 1], [72]]]
    counts = [vltok.SparseVLM().budgets(SimpleNamespace(**{**vars(state), "layer": layer}))[1] for layer in (3, 7, 16)]
    assert counts == [[300], [200], [118]]
    assert vltok.FastV(keep_ratio=0.5).budgets(state) == [[38, 1], [288]]
    assert vltok.FastV(num_keep=100).budgets(state) == [[75, 1], [100]]


LAYERS = [(32, (8, 16, 24)), (28, (7, 14, 21)), (4, (1, 2, 3)), (2, (1,)), (1, ())]


@pytest.mark.parametrize(("length", "layers"), LAYERS)
def test_stages_of_decoders_of_any_length(length, layers):
    assert vltok.PyramidDrop().layers(length) == layers
    assert vltok.SparseVLM().layers(32) == (3, 7, 16)
    state = SimpleNamespace(image_lengths=[[1000]], num_layers=length)
    counts = []
    for state.layer in layers:
        counts += vltok.PyramidDrop().budgets(state)[0]
    assert counts == ([500, 250, 125] if length > 2 else [125])[: len(layers)]


def test_regions_of_grids_of_unequal_size():
    grids = [[(1, 4, 6), (2, 3, 2)]]
    places = [(0, r, c) for r in range(4) for c in range(6)]
    places += [(f, r, c) for f in (0, 1) for r in range(3) for c in (0, 1)]
    coordinates = torch.tensor([[*places, (-1, -1, -1)]])
    images = torch.tensor([[0] * 24 + [1] * 12 + [1]])
    expected = [(r * 2 // 4) * 3 + c * 3 // 6 for _, r, c in places[:24]]
    expected += [(r * 2 // 3) * 3 + c * 3 // 2 for _, r, c in places[24:]] + [5]
    regions = regions_of(coordinates, images, grids, (2, 3))
    assert regions[0].tolist() == expected
    assert regions[0, :24].bincount().tolist() == [4] * 6
    with pytest.raises(ValueError, match="leave out window"):
        regions_of(coordinates, images, [[(1, 4, 6), None]], (2, 3))


def test_one_region_ranks_as_none():
    scores, images, _ = random_rows(3, 2, 20, 5)
    budgets = [[2, 3, 1]] * 2
    assert torch.equal(keep_top(scores, images, budgets, torch.zeros_like(images)), keep_top(scores, images, budgets))


# SparseVLM


@pytest.mark.parametrize(
    ("name", "keep", "begin", "count", "heads"),
    [("sparsevlm_v1_n200_k64_layer6", 30, 10, 200, None), ("sparsevlm_plus_n120_k64_layer2", 66, 10, 120, 14)],
)
def test_sparsevlm_chooses_the_words_and_tokens_of_the_released_code(name, keep, begin, count, heads):
    golden = load_file(DATA / f"{name}.safetensors")
    x, rows = golden["in.hidden0"], golden["in.text_rows"]
    end, length = begin + count, x.shape[1]
    images = images_at(length, (begin, end))
    scores = rater_scores(x[0, begin:end], x[0, end:])
    torch.testing.assert_close(scores, golden["out.rater_score"], rtol=1e-5, atol=1e-7)
    raters = choose_raters(x, images >= 0, torch.arange(length)[None] >= end)
    assert torch.equal(raters[0, end:].nonzero().squeeze(1), golden["out.raters"])
    if heads:  # of its later version; ours has all of them count
        mass = rows[:, golden["out.raters"], begin:end].sum((1, 2))
        rows = rows[mass.topk(heads).indices]
    state = fake_state(x, images, images >= 0, torch.arange(length)[None] >= end)
    state.attention = lambda queries: rows.mean(0)[queries[0] - end].unsqueeze(0)
    state.image_lengths = [[count]]
    method = vltok.SparseVLM(ratios=(keep / count,), depths=(0.5,))
    assert torch.equal(method.keep(state)[0, begin:end], golden["out.mask"])
    torch.testing.assert_close(
        rows.mean(0)[golden["out.raters"], begin:end].mean(0), golden["out.score"], rtol=1e-5, atol=1e-7
    )


def fake_state(x, images, is_visual, is_text) -> SimpleNamespace:
    """What a rule in stages is shown at the last of them, when nothing has left."""
    slots = torch.arange(x.shape[1]).expand(len(x), -1)
    return SimpleNamespace(
        layer=16,
        num_layers=32,
        images=images,
        is_visual=is_visual,
        is_text=is_text,
        last=torch.full((len(x),), x.shape[1] - 1),
        entry=Entry(x, is_visual, is_text, slots),
        image_lengths=[[int(is_visual[row].sum())] for row in range(len(x))],
    )


def naive_raters(x: torch.Tensor, visual: list[int], text: list[int]) -> list[int]:
    """The words by the definition, in float64."""
    shares = [0.0] * len(text)
    for v in visual:
        products = torch.stack([(x[v].double() * x[t].double()).sum() for t in text])
        for number, share in enumerate(products.softmax(0).tolist()):
            shares[number] += share / len(visual)
    return [t for t, share in zip(text, shares, strict=True) if share > sum(shares) / len(shares)]


def test_raters_are_those_of_the_naive_twin_and_of_the_row_alone():
    x = 1.5 * torch.randn(3, 14, 6, generator=torch.Generator().manual_seed(2))
    kinds = ["ssvvvvvvtttttt", "vvtttt........", "..svvtvvtvtttt"]
    is_visual, is_text = (torch.tensor([[c == kind for c in row] for row in kinds]) for kind in "vt")
    raters = choose_raters(x, is_visual, is_text)
    for row in range(3):
        members = [mask[row].nonzero().squeeze(1).tolist() for mask in (is_visual, is_text)]
        assert raters[row].nonzero().squeeze(1).tolist() == naive_raters(x[row], *members)
        own = slice(row, row + 1)
        assert torch.equal(choose_raters(x[own], is_visual[own], is_text[own])[0], raters[row])


@pytest.mark.parametrize(("kinds", "raters"), [("svvt", [3]), ("svv", []), ("sttt", []), ("vvttt", [2, 3, 4])])
def test_words_that_are_alike_all_rate_and_none_rate_nothing(kinds, raters):
    x = torch.ones(1, len(kinds), 4)
    is_visual, is_text = (torch.tensor([[c == kind for c in kinds]]) for kind in "vt")
    assert choose_raters(x, is_visual, is_text)[0].nonzero().squeeze(1).tolist() == raters


def test_sparsevlm_averages_over_the_words_of_each_sample_and_falls_back_to_the_last_token():
    x = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    is_visual = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]).bool()
    is_text = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8]).bool()
    maps = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1))
    state = fake_state(x, torch.where(is_visual, 0, -1), is_visual, is_text)
    state.attention = lambda queries: torch.stack([own[q] for own, q in zip(maps, queries, strict=True)])
    keep = vltok.SparseVLM(ratios=(0.5,), depths=(0.5,)).keep(state)
    words = choose_raters(x, is_visual, is_text)[0]
    assert words.sum() > 1
    for row, scores in enumerate((maps[0, words].mean(0), maps[1, -1])):
        best = scores.masked_fill(~is_visual[row], -1).argsort(descending=True)[:2]
        assert torch.equal(keep[row] & is_visual[row], torch.zeros(8, dtype=torch.bool).index_fill(0, best, True))


# DART


def naive_dart(states, keys, visual: list[int], text: list[int], keep: int) -> list[int]:
    """Pivot by pivot, in float64."""
    if keep >= len(visual):
        return visual
    norms = keys.double().square().sum(1).tolist()

    def largest(places: list[int], count: int) -> list[int]:
        return sorted(places, key=lambda p: (-norms[p], p))[:count]

    kept = largest(visual, min(4, keep))
    pivots = sorted(kept + largest(text, 4))
    share, more = divmod(keep - len(kept), len(pivots))
    x = states.double()
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    pool = [place for place in visual if place not in kept]
    for turn, pivot in enumerate(pivots):
        pool.sort(key=lambda p: (round(float(x[p] @ x[pivot]), 9), p))
        take = share + (turn < more)
        kept, pool = kept + pool[:take], pool[take:]
    return sorted(kept)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**20), st.integers(1, 24), st.integers(0, 6), st.integers(1, 26))
def test_dart_keeps_exactly_the_budget_and_what_the_naive_twin_keeps(seed, length, words, keep):
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers of equal length: cosines are exact, and duplicates, ties and zero rows come up.
    signs = torch.randint(0, 2, (length + words + 2, 4), generator=generator) * 2.0 - 1
    states = signs * (torch.rand(len(signs), 1, generator=generator) > 0.1)
    keys = torch.randint(-3, 4, (len(signs), 5), generator=generator).float()
    visual, text = torch.arange(2, 2 + length), torch.arange(2 + length, len(signs))
    kept = select_unlike(states, keys, visual, text, keep)
    assert len(kept) == min(keep, length)
    assert kept.tolist() == naive_dart(states, keys, visual.tolist(), text.tolist(), keep)


def test_dart_takes_half_precision_as_it_is():
    stored = load_file(DATA / "dart_l640_n576_k128.safetensors")
    states = stored["in.state"][0].bfloat16()
    keys = stored["in.keys"][0].transpose(0, 1).flatten(1).bfloat16()
    visual, text = torch.arange(35, 611), torch.arange(611, 640)
    assert torch.equal(
        select_unlike(states, keys, visual, text, 100), select_unlike(states.float(), keys.float(), visual, text, 100)
    )


def test_dart_looks_at_each_image_of_each_sample_alone():
    generator = torch.Generator().manual_seed(0)
    states, keys = (torch.randn(2, 30, 8, generator=generator) for _ in range(2))
    images = images_at(30, (1, 11), (13, 23)).repeat(2, 1)
    images[1, 13:23] = -1
    is_text = (images < 0) & (torch.arange(30) > 10)
    state = SimpleNamespace(
        hidden_states=states,
        keys=keys,
        images=images,
        is_visual=images >= 0,
        is_text=is_text,
        image_lengths=[[10, 10], [10]],
    )
    keep = vltok.DARTDecoder(num_keep=6).keep(state)
    for row, image in ((0, 0), (0, 1), (1, 0)):
        visual, text = ((images[row] == image).nonzero().squeeze(1), is_text[row].nonzero().squeeze(1))
        expected = select_unlike(states[row], keys[row], visual, text, 6)
        assert torch.equal((keep[row] & (images[row] == image)).nonzero().squeeze(1), expected)
    assert keep[images < 0].all()


@pytest.mark.parametrize("fault", ["states", "keys"])
def test_dart_refuses_nan_and_no_budget(fault):
    given = {"states": torch.randn(9, 4), "keys": torch.randn(9, 4)}
    visual, text = torch.arange(6), torch.arange(6, 9)
    with pytest.raises(ValueError, match="at least 1"):
        select_unlike(**given, visual=visual, text=text, num_keep=0)
    given[fault][2, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        select_unlike(**given, visual=visual, text=text, num_keep=5)


# Settings


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: vltok.FastV(), ValueError, "exactly one"),
        (lambda: vltok.FastV(keep_ratio=0.5, num_keep=3), ValueError, "exactly one"),
        (lambda: vltok.FastV(keep_ratio=0.0), ValueError, "keep_ratio"),
        (lambda: vltok.FastV(keep_ratio=0.5, layer=0), ValueError, "layer"),
        (lambda: vltok.FastV(keep_ratio=0.5, window=3), TypeError, "window"),
        (lambda: vltok.FastV(keep_ratio=0.5, window=(2, 0)), ValueError, "window"),
        (lambda: vltok.DARTDecoder(), ValueError, "exactly one"),
        (lambda: vltok.PyramidDrop(ratios=0.5), TypeError, "ratios"),
        (lambda: vltok.PyramidDrop(ratios=(0.5,)), ValueError, "equally many"),
        (lambda: vltok.PyramidDrop(ratios=(0.5, 0.6, 0.1)), ValueError, "none above"),
        (lambda: vltok.SparseVLM(ratios=(1.5, 0.6, 0.1)), ValueError, "in \\(0, 1\\]"),
        (lambda: vltok.SparseVLM(depths=(0.5, 0.5, 0.6)), ValueError, "ascending"),
        (lambda: RuleInStages(), TypeError, "ratios"),
    ],
)
def test_settings_out_of_range_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_layer_behind_the_decoder_is_refused():
    assert vltok.FastV(keep_ratio=0.5, layer=3).layers(4) == (3,)
    with pytest.raises(ValueError, match=r"give one in 1\.\.3"):
        vltok.FastV(keep_ratio=0.5, layer=4).layers(4)


@pytest.mark.parametrize(
    "method",
    [
        vltok.FastV(0.25, window=(2, 3)),
        vltok.PyramidDrop(ratios=(1, 0.5, 0.5)),
        vltok.SparseVLM(),
        vltok.DARTDecoder(num_keep=64),
    ],
    ids=lambda method: method.name,
)
def test_settings_are_saved_and_read(method):
    assert vltok.Method.from_dict(method.to_dict()) == method
    assert vltok.Method.from_text("fastv,keep_ratio=0.5,window=(2,2)") == vltok.FastV(0.5, window=(2, 2))
