"""The ledger: every kind of change can be taken back, in reverse, once, and not through somebody else's change."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from unchanged import unchanged

from vltok.edits import Edits, MethodWrapper
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


# Copies


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


COPIES = pytest.mark.parametrize("twin_of", [copy.deepcopy, pickled])


class Scaled:
    """A hook that holds the module it is about, and a ledger, as an engine does."""

    def __init__(self, module: nn.Module, edits: Edits, factor: float) -> None:
        self.module, self.edits, self.factor = module, edits, factor

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (self.factor * args[0],), kwargs


class Loud(MethodWrapper):
    """Adds to what a method returns."""

    def __init__(self, by: int) -> None:
        self.by = by

    def around(self, call: Callable[..., int], *args: Any, **kwargs: Any) -> int:
        return call(*args, **kwargs) + self.by


class Counting(nn.Module):
    """A module with a method."""

    def count(self, start: int = 0) -> int:
        return start + 1


def rename(module: nn.Module, name: str) -> None:
    module.was = name


def change_everything(model: nn.Module) -> Edits:
    edits = Edits(model)
    edits.set_attribute(model, "title", "changed")
    edits.set_attribute(model, "size", 10**6)  # a number that pickle makes anew
    edits.before(model[0], Scaled(model[0], edits, 3.0).before)
    edits.after(model, torch.nn.Module.train, always=True)
    edits.swap(model, "1", Doubled())
    edits.add_child(model[0], "extra", nn.Linear(1, 1))
    edits.wrap_method(model, "extra_repr", Loud(5))
    edits.list_on(model, "notes", "a note")
    edits.at_undo(functools.partial(rename, model, "undone"))
    return edits


@COPIES
@pytest.mark.parametrize("order", [("model", "edits"), ("edits", "model"), ("wrapper", "edits")])
def test_a_copied_ledger_acts_on_the_copied_model_alone(model, twin_of, order):
    edits = change_everything(model)
    twins = twin_of({name: {"model": model, "edits": edits, "wrapper": nn.Sequential(model)}[name] for name in order})
    twin = twins["model"] if "model" in twins else twins["wrapper"][0]
    assert twin[0]._forward_pre_hooks and len(twins["edits"]) == len(edits)
    with unchanged(model):
        twins["edits"].undo()
    assert len(edits) == 9 and len(twins["edits"]) == 0
    assert type(twin[1]) is nn.Sequential
    assert "extra" not in dict(twin[0].named_children())
    assert not twin[0]._forward_pre_hooks and not twin._forward_hooks
    assert not twin._forward_hooks_always_called and not twin._forward_hooks_with_kwargs
    assert {"title", "size", "notes", "extra_repr"}.isdisjoint(vars(twin)) and twin.was == "undone"
    edits.undo()
    assert type(model[1]) is nn.Sequential


def test_a_part_copied_by_itself_takes_no_ledger_along(model):
    edits = change_everything(model)
    part = copy.deepcopy(model[0])
    (hook,) = part._forward_pre_hooks.values()
    assert hook.__self__.module is part
    assert len(hook.__self__.edits) == 0
    edits.undo()


def test_two_ledgers_of_one_host_are_both_copied_whichever_way_the_copy_comes(model):
    first, second = Edits(model), Edits(model)
    outside = nn.Sequential(model)
    for edits in (first, second):
        edits.before(outside, Scaled(model, edits, 2.0).before)
        edits.before(model[0], Scaled(model, edits, 2.0).before)
    twin = copy.deepcopy(outside)
    ledgers = [hook.__self__.edits for hook in twin._forward_pre_hooks.values()]
    assert [len(each) for each in ledgers] == [2, 2]
    for each in ledgers:
        each.undo()
    assert not twin._forward_pre_hooks and not twin[0][0]._forward_pre_hooks
    assert len(outside._forward_pre_hooks) == len(model[0]._forward_pre_hooks) == 2


def test_a_hook_of_an_unpickled_model_keeps_its_key_to_itself(model, monkeypatch):
    edits = Edits(model)
    hook = edits.before(model, Scaled(model, edits, 3.0).before)
    text = pickle.dumps((model, edits))
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", hook.key)  # as in a new process
    twin, _ = pickle.loads(text)
    twin.register_forward_pre_hook(lambda *_: None)
    assert len(twin._forward_pre_hooks) == 2


def test_a_closure_is_not_kept_for_the_undo(model):
    with pytest.raises(TypeError, match="closure"):
        Edits().at_undo(lambda: model.train())


# Models that change meanwhile


def test_a_hook_says_whether_it_is_on_and_can_be_dropped(model):
    edits = Edits(model)
    with unchanged(model):
        first, second = edits.before(model, lambda *_: None), edits.after(model, lambda *_: None, always=True)
        assert first.is_on and second.is_on
        edits.drop(second)
        assert first.is_on and not second.is_on and len(edits) == 1
        model._forward_pre_hooks.clear()  # as somebody else may
        assert not first.is_on
        edits.undo()


@pytest.mark.parametrize("keeps", ["original", "copy"])
def test_hooks_are_taken_off_parts_that_were_replaced_or_copied(model, keeps):
    old, edits = model[0], Edits(model)
    edits.before(old, Scaled(old, edits, 3.0).before)
    edits.after(old, nn.Module.train, always=True)
    model[0] = nn.Sequential(old if keeps == "original" else copy.deepcopy(old))
    edits.undo()
    for part in (old, *model.modules()):
        tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
        assert not any(getattr(part, table) for table in (*tables, "_forward_pre_hooks_with_kwargs"))


def test_a_ledger_takes_changes_from_several_threads(model):
    edits, parts = Edits(model), [nn.Linear(1, 1) for _ in range(4)]
    threads = [threading.Thread(target=lambda: [edits.before(p, print) for p in parts * 50]) for _ in range(4)]
    with unchanged(*parts):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(edits) == 800
        edits.undo()


# Wrapped methods


def test_a_wrapped_method_calls_what_was_there_and_goes_away_again():
    model, edits = Counting(), Edits()
    with unchanged(model):
        edits.wrap_method(model, "count", Loud(10))
        edits.wrap_method(model, "count", Loud(100))
        assert model.count(start=1) == 112
        edits.undo()
    assert model.count(1) == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_wrappers_of_two_ledgers_leave_in_any_order(order):
    model, ledgers = Counting(), [Edits(), Edits()]
    with unchanged(model):
        for edits, by in zip(ledgers, (10, 100), strict=True):
            edits.wrap_method(model, "count", Loud(by))
        assert model.count() == 111
        ledgers[order[0]].undo()
        assert model.count() == (101, 11)[order[0]]
        ledgers[order[1]].undo()


def test_what_came_in_the_place_of_a_wrapper_stays_and_calls_through():
    model, edits = Counting(), Edits()
    edits.wrap_method(model, "count", Loud(10))
    wrapped = model.count
    model.count = mine = lambda: wrapped() + 1000
    assert model.count() == 1011
    edits.undo()
    assert model.count is mine
    assert model.count() == 1001


@COPIES
def test_a_wrapper_on_a_copy_calls_the_copys_method(twin_of):
    model, edits = Counting(), Edits()
    edits.wrap_method(model, "count", Loud(10))
    twin = twin_of(model)
    assert twin.count.owner is twin
    assert twin.count() == 11


def test_entries_of_a_list_leave_in_any_order(model):
    ledgers = [Edits(), Edits()]
    with unchanged(model):
        for number, edits in enumerate(ledgers):
            edits.list_on(model, "notes", number)
        ledgers[0].undo()
        assert model.notes == [1]
        ledgers[1].undo()
