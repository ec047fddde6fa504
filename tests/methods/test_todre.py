"""The ToDRE method: its settings, and how the stages come together."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vltok.method import Method
from vltok.methods.pruning.todre import ToDRE, choose_pivot, select_diverse
from vltok.visual import AttentionRequest, VisualTokens


def visual(batch: int = 2, length: int = 30) -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    return VisualTokens(
        embeddings=torch.randn(batch, length, 8, generator=generator),
        image_keys=torch.arange(batch),
        attention=torch.rand(batch, length, generator=generator),
        is_overview=torch.arange(length).expand(batch, -1) < 10,
    )


class RecordingView:
    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def on_visual_tokens(self, edits, run, selector):
        self.calls.append(("visual tokens", selector))

    def on_decoder_layers(self, edits, run, rule):
        self.calls.append(("decoder layers", rule))


@pytest.mark.parametrize("strategy", ["max_sum", "k_center"])
@pytest.mark.parametrize("pivot", ["auto", "cls", "center", "farthest", "random"])
def test_select_is_pivot_then_diversity(strategy, pivot):
    tokens = visual()
    method = ToDRE(num_keep=7, strategy=strategy, pivot=pivot, seed=3)
    first = choose_pivot(
        tokens.embeddings,
        pivot,
        attention=tokens.attention,
        image_keys=tokens.image_keys,
        is_overview=tokens.is_overview,
        seed=3,
    )
    kept = method.select(tokens, 7)
    assert torch.equal(kept, select_diverse(tokens.embeddings, 7, first, strategy))
    assert (kept == first.unsqueeze(1)).any(1).all()
    assert (first < 10).all()


@pytest.mark.parametrize(
    ("pivot", "has_cls", "expected"),
    [
        ("auto", True, AttentionRequest("cls", -1)),
        ("auto", False, None),
        ("cls", True, AttentionRequest("cls", -1)),
        ("cls", False, AttentionRequest("cls", -1)),  # the family refuses it, with the tower's name
        ("center", True, None),
        ("random", False, None),
    ],
)
def test_attention_is_asked_for_only_where_it_is_used(pivot, has_cls, expected):
    assert ToDRE(keep_ratio=0.1, pivot=pivot).attention_request(has_cls) == expected


@pytest.mark.parametrize(
    ("depth", "num_layers", "expected"),
    [
        (7 / 8, 32, (28,)),
        (7 / 8, 28, (24,)),
        (7 / 8, 30, (26,)),
        ((4 / 8, 5 / 8, 6 / 8, 7 / 8), 32, (16, 20, 24, 28)),
        ([0.75, 0.5], 4, (2, 3)),
        ((0.5, 0.51), 4, (2,)),
        (0.7, 10, (7,)),  # 0.7 * 10 is 7 in spite of rounding
        (0.29, 100, (29,)),
        (0.01, 4, (1,)),
        (0.999, 4, (3,)),
        (0.5, 1, ()),
    ],
)
def test_layers(depth, num_layers, expected):
    assert ToDRE(keep_ratio=0.1, depth=depth).layers(num_layers) == expected


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"keep_ratio": 0.1}, (1, 2)),
        ({"keep_ratio": 0.1, "relevance": False}, (1,)),
        ({"keep_ratio": 0.1, "stages": [1]}, (1,)),
        ({"num_keep": 5, "stages": (1, 2)}, (1, 2)),
        ({"stages": (2,)}, (2,)),
        ({"keep_ratio": 0.1, "stages": (2,)}, (2,)),
    ],
)
def test_stages_and_relevance_agree_and_the_stages_attach(settings, stages):
    method = ToDRE(**settings)
    assert (method.stages, method.relevance) == (stages, 2 in stages)
    view = RecordingView()
    method.attach(view, None, None)
    names = {1: "visual tokens", 2: "decoder layers"}
    assert view.calls == [(names[stage], method) for stage in stages]


def test_settings_survive_a_json_file():
    for method in (
        ToDRE(keep_ratio=0.25),
        ToDRE(num_keep=9, strategy="k_center", pivot="random", relevance=False, seed=4, positions="reindex"),
        ToDRE(stages=(2,), depth=[0.5, 0.75], tau=0.03),
    ):
        assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_lists_become_tuples_so_that_it_is_hashable():
    method = ToDRE(keep_ratio=0.1, depth=[0.5, 0.75], stages=[1, 2])
    assert (method.depth, method.stages) == ((0.5, 0.75), (1, 2))
    assert hash(method) == hash(ToDRE(keep_ratio=0.1, depth=(0.5, 0.75)))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "exactly one of keep_ratio and num_keep, got neither"),
        ({"keep_ratio": 0.1, "num_keep": 4}, ValueError, "exactly one"),
        ({"stages": (1,)}, ValueError, "exactly one"),
        ({"keep_ratio": 0}, ValueError, r"in \(0, 1\], got 0"),
        ({"keep_ratio": 1.5}, ValueError, r"in \(0, 1\], got 1.5"),
        ({"keep_ratio": math.nan}, ValueError, "got nan"),
        ({"keep_ratio": "x"}, TypeError, "got 'x'"),
        ({"keep_ratio": True}, TypeError, "got True"),
        ({"num_keep": 0}, ValueError, "at least 1, got 0"),
        ({"num_keep": 2.5}, TypeError, "got 2.5"),
        ({"num_keep": True}, TypeError, "got True"),
        ({"keep_ratio": 0.1, "positions": "drop"}, ValueError, "positions must be"),
        ({"stages": (2,), "positions": "drop"}, ValueError, "positions must be"),
        (
            {"keep_ratio": 0.1, "strategy": "max"},
            ValueError,
            "strategy must be one of 'max_sum', 'k_center', got 'max'",
        ),
        ({"keep_ratio": 0.1, "pivot": "centre"}, ValueError, "pivot must be one of 'auto'"),
        ({"keep_ratio": 0.1, "depth": 0}, ValueError, r"depth must be .* in \(0, 1\), or several, got 0"),
        ({"keep_ratio": 0.1, "depth": 1.0}, ValueError, "depth must be"),
        ({"keep_ratio": 0.1, "depth": ()}, ValueError, "depth must be"),
        ({"keep_ratio": 0.1, "depth": (0.5, "x")}, ValueError, "depth must be"),
        ({"keep_ratio": 0.1, "depth": True}, ValueError, "depth must be"),
        ({"keep_ratio": 0.1, "tau": -0.1}, ValueError, r"tau must be a share of attention in 0\.\.1"),
        ({"keep_ratio": 0.1, "tau": math.nan}, ValueError, "tau must be"),
        ({"keep_ratio": 0.1, "tau": "0.1"}, ValueError, "tau must be"),
        ({"keep_ratio": 0.1, "stages": (3,)}, ValueError, "stages must be"),
        ({"keep_ratio": 0.1, "stages": 2}, ValueError, "stages must be"),
        ({"keep_ratio": 0.1, "stages": ()}, ValueError, "stages must be"),
        ({"keep_ratio": 0.1, "relevance": False, "stages": (1, 2)}, ValueError, "leaves out stage 2"),
        ({"keep_ratio": 0.1, "relevance": "no"}, TypeError, "relevance must be True or False"),
        ({"keep_ratio": 0.1, "seed": 0.5}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings, error, message):
    with pytest.raises(error, match=message):
        ToDRE(**settings)
