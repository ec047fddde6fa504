"""Every selector is measured beside ToDRE's first stage, on tokens of which all is shown that it may ask for."""

from __future__ import annotations

import json

import pytest
import torch

import vltok
from eval import selection
from vltok.method import Method


def selectors_of_images() -> set[type]:
    """The public selectors, but for those of videos."""
    public = [getattr(vltok, name) for name in vltok.__all__]
    found = {each for each in public if isinstance(each, type) and issubclass(each, Method)}
    abstract = {vltok.Selector, vltok.TextSelector}
    return (
        {each for each in found if issubclass(each, vltok.Selector)}
        - abstract
        - {vltok.EVS, vltok.VidCom2, vltok.StrideFrames}
    )


def test_every_selector_of_images_is_measured():
    measured = {type(make(4)) for make in selection.SELECTORS.values()}
    assert measured == selectors_of_images()


def test_each_picks_as_many_as_asked_of_what_is_measured():
    case = selection.Case(2, 48, 32, 12)
    visual = selection.visual_of(case, "cpu")
    for make in selection.SELECTORS.values():
        method = make(case.keep)
        count = method.budget(case.length, visual.grid, "image")
        assert method.pick(visual, count).indices.shape == (2, count)
        assert count <= case.keep


def test_the_table_says_how_long_each_takes_beside_todre(monkeypatch, capsys):
    monkeypatch.setattr(selection, "TOWER_WIDTH", 32)
    took = selection.measure_methods(selection.Case(1, 48, 32, 12), "cpu", 0.001)
    assert took.keys() == selection.SELECTORS.keys() and min(took.values()) > 0
    monkeypatch.setattr(selection, "measure_methods", lambda *sizes: took)
    selection.main(["--methods", "--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith("ToDRE  ")] == [["1.00", "1.00"]]
    assert sum(line.startswith(tuple(selection.SELECTORS)) for line in lines) >= len(selection.SELECTORS)


def test_ratios_are_those_of_the_times(monkeypatch, capsys, tmp_path):
    took = {"select_diverse": 6.0, "gram": 3.0, "rows": 2.0, "divprune": 4.0, "published": 8.0}
    monkeypatch.setattr(selection, "medians", lambda *given: took)
    monkeypatch.setattr(selection, "cases", lambda quick: [selection.Case(1, 12, 8, 3)])
    selection.main(["--json", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [each["dtype"] for each in results] == ["float32", "bfloat16"]
    ratios = {name: value for name, value in results[0].items() if "to_" in name}
    assert list(ratios.values()) == [2.0, 3.0, 3.0, 0.75, 0.5]
    assert capsys.readouterr().out.split("times\n")[1].splitlines()[1].split() == ["1", "12", "8", "3", "1.00"]


def test_the_published_formulation_picks_what_divprune_does():
    tokens = selection.tokens_of(selection.Case(1, 40, 16, 9), torch.float32, "cpu")
    expected = selection.select_max_min(tokens, 9)[0].sort().values
    assert torch.equal(selection.published_max_min(tokens[0], 9).sort().values, expected)


@pytest.mark.parametrize("length", [576, 2880])
def test_tokens_form_a_grid(length):
    visual = selection.visual_of(selection.Case(1, length, 8, 4), "cpu")
    assert torch.equal(visual.coordinates[0, -1], torch.tensor(visual.grid) - 1)
