"""The ledger: every kind of change can be taken back, in reverse, once, and not through somebody else's change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from unchanged import unchanged

from vltok.edits import Edits
from vltok.errors import EditConflictError


class Doubled(nn.Module):
    """A child to swap in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3))).eval()


def test_a_hook_before_a_module_may_change_what_goes_in(model):
    x = torch.ones(2, 3)
    expected = model(3 * x)
    edits = Edits()
    with unchanged(model):
        edits.before(model, lambda module, args, kwargs: ((3 * args[0],), kwargs))
        assert torch.equal(model(x), expected)
        edits.undo()
    assert not torch.equal(model(x), expected)


def test_a_hook_after_a_module_may_change_what_comes_out(model):
    x = torch.ones(2, 3)
    expected = model(x) + 1
    edits = Edits()
    with unchanged(model):
        edits.after(model, lambda module, args, kwargs, output: output + 1)
        assert torch.equal(model(x), expected)
        edits.undo()


def test_a_hook_is_called_after_a_failing_forward_only_on_request(model):
    calls = []
    edits = Edits()
    edits.after(model, lambda *_: calls.append("on success"))
    edits.after(model, lambda *_: calls.append("always"), always=True)
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 4))
    assert calls == ["always"]


def test_hooks_see_keyword_arguments():
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, *, by: float) -> torch.Tensor:
            return x * by

    seen = []
    module, edits = Scale(), Edits()
    edits.before(module, lambda module, args, kwargs: (args, {"by": kwargs["by"] + 1}))
    edits.after(module, lambda module, args, kwargs, output: seen.append(kwargs))
    assert module(torch.ones(1), by=2.0).item() == 3
    assert seen == [{"by": 3.0}]


def test_a_swap_takes_the_place_of_a_child_and_gives_it_back(model):
    old, new, edits = model[1], Doubled(), Edits()
    with unchanged(model):
        edits.swap(model, "1", new)
        assert model[1] is new
        assert edits.added_modules == (new,)
        edits.undo()
    assert model[1] is old
    assert edits.added_modules == ()


@pytest.mark.parametrize("training", [True, False])
def test_a_swap_carries_the_mode_over_and_back(model, training):
    old, new, edits = model[1], Doubled(), Edits()
    model.train(training)
    edits.swap(model, "1", new)
    assert new.training is training
    model.train(not training)
    edits.undo()
    assert old.training is old[0].training is (not training)


def test_an_added_child_has_the_mode_of_its_parent_and_its_weights_are_the_models(model):
    edits = Edits()
    child = nn.Linear(3, 5)
    with unchanged(model):
        edits.add_child(model[1], "extra", child)
        assert not child.training
        assert "1.extra.weight" in model.state_dict()
        assert edits.added_modules == (child,)
        edits.undo()


@pytest.mark.parametrize("name", ["0", "training", "forward"])
def test_a_child_is_not_added_over_something_that_is_there(model, name):
    edits = Edits()
    with unchanged(model), pytest.raises(EditConflictError, match=f"already has '{name}'"):
        edits.add_child(model, name, Doubled())
    assert len(edits) == 0


def test_an_attribute_goes_back_to_its_old_value_or_to_the_class():
    class Settings:
        inherited = "of the class"

        def __init__(self) -> None:
            self.own = "of the object"

    settings, edits = Settings(), Edits()
    edits.set_attribute(settings, "own", 1)
    edits.set_attribute(settings, "inherited", 2)
    edits.set_attribute(settings, "fresh", 3)
    assert vars(settings) == {"own": 1, "inherited": 2, "fresh": 3}
    edits.undo()
    assert vars(settings) == {"own": "of the object"}
    assert settings.inherited == "of the class"


def test_undo_runs_backwards(model):
    edits, order = Edits(), []

    class Noted:
        def __setattr__(self, name: str, value: object) -> None:
            order.append(name)
            super().__setattr__(name, value)

    target = Noted()
    target.a = target.b = 0
    edits.set_attribute(target, "a", 1)
    edits.set_attribute(target, "b", 2)
    order.clear()
    edits.undo()
    assert order == ["b", "a"]


def test_one_ledger_may_change_the_same_part_twice(model):
    edits = Edits()
    with unchanged(model):
        for value in (1, 2):
            edits.swap(model, "1", Doubled())
            edits.set_attribute(model, "knob", value)
        edits.undo()


def test_undo_does_nothing_the_second_time(model):
    edits = Edits()
    edits.swap(model, "1", Doubled())
    edits.set_attribute(model, "knob", 1)
    edits.undo()
    later = Edits()
    later.set_attribute(model, "knob", 2)
    with unchanged(model):
        edits.undo()
    assert model.knob == 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda edits, model: edits.swap(model, "1", Doubled()), "'1' of Sequential"),
        (lambda edits, model: edits.set_attribute(model, "knob", object()), "'knob' of Sequential"),
    ],
)
def test_a_change_under_a_later_one_is_not_torn_out(model, change, what):
    first, second = Edits(), Edits()
    with unchanged(model):
        first.before(model, lambda *_: None)
        change(first, model)
        first.after(model, lambda *_: None)
        change(second, model)
        with unchanged(model), pytest.raises(EditConflictError, match=what):
            first.undo()
        assert len(first) == 3
        second.undo()
        first.undo()


def test_a_child_that_was_replaced_by_hand_is_not_overwritten(model):
    edits, mine = Edits(), Doubled()
    edits.add_child(model, "extra", nn.Identity())
    model.extra = mine
    with pytest.raises(EditConflictError, match="'extra' of Sequential"):
        edits.undo()
    assert model.extra is mine


def test_what_was_done_before_a_failure_can_be_undone(model):
    edits = Edits()
    with unchanged(model):
        edits.swap(model, "1", Doubled())
        edits.after(model, lambda *_: None)
        with pytest.raises(AttributeError):
            edits.swap(model, "no such child", Doubled())
        assert len(edits) == 2
        edits.undo()


CHANGES = {
    "before": lambda edits, module: edits.before(module, lambda *_: None),
    "after": lambda edits, module: edits.after(module, lambda *_: None),
    "swap": lambda edits, module: edits.swap(module, "child", Doubled()),
    "add": lambda edits, module: edits.add_child(module, f"added_{len(edits)}", nn.Linear(2, 2)),
    "set": lambda edits, module: edits.set_attribute(module, "knob", object()),
    "new": lambda edits, module: edits.set_attribute(module, f"knob_{len(edits)}", object()),
}


class Part(nn.Module):
    """A module with a child and a knob."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child
        self.knob = 1


@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 2)), max_size=8))
def test_any_sequence_of_changes_is_undone(changes):
    parts = [Part(nn.Identity())]
    parts += [Part(parts[0])]
    parts += [Part(parts[1])]
    edits = Edits()
    with unchanged(parts[2]):
        for change, part in changes:
            CHANGES[change](edits, parts[part])
        edits.undo()
