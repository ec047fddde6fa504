"""Every selector is measured beside ToDRE's first stage, on tokens of which all is shown that it may ask for."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

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


def test_the_table_says_how_long_each_takes_beside_todre(monkeypatch):
    monkeypatch.setattr(selection, "TOWER_WIDTH", 32)
    took = selection.measure_methods(selection.Case(1, 48, 32, 12), "cpu", 0.001)
    assert took.keys() == selection.SELECTORS.keys() and min(took.values()) > 0
    shown: list[dict] = []
    monkeypatch.setattr(selection, "measure_methods", lambda *sizes: took)
    monkeypatch.setattr(selection, "show_methods", lambda results, about: shown.append(results))
    threads = torch.get_num_threads()
    try:
        app = selection.typer.Typer()
        app.command()(selection.main)
        assert CliRunner().invoke(app, ["--methods", "--quick"]).exit_code == 0
    finally:
        torch.set_num_threads(threads)
    assert [len(results) for results in shown] == [2]


@pytest.mark.parametrize("length", [576, 2880])
def test_tokens_form_a_grid(length):
    visual = selection.visual_of(selection.Case(1, length, 8, 4), "cpu")
    assert torch.equal(visual.coordinates[0, -1], torch.tensor(visual.grid) - 1)
