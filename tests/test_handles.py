"""Handles: found on the model they are about, copied and pickled with it, with other settings for a while."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LLAVA, LLAVA_NEXT, TinyFamily, picture
from torch import nn
from transformers import IJepaConfig, IJepaModel
from unchanged import unchanged

import vltok
from vltok.calls import Calls, _stacks
from vltok.errors import EditConflictError
from vltok.families.towers import TOWERS
from vltok.families.towers.base import TowerFamily
from vltok.report import Diversification, Report
from vltok.run import Run

METHODS = {
    "divprune": vltok.DivPrune(num_keep=5),
    "fastervlm": vltok.FasterVLM(num_keep=5),
    "tokenpacker": vltok.TokenPacker(scale_factor=2, init="pool"),
    "soft": vltok.SOFT(ratio=2),
    "tap": vltok.TAP(num_scales=3),
    "adl": vltok.ADL(),
}


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def apply(model: nn.Module, method: str, family: TinyFamily = LLAVA) -> vltok.Handle:
    return vltok.apply(model, METHODS[method], processor=family.processor())


def inputs_of(processor: Any, family: TinyFamily = LLAVA) -> Any:
    return family.inputs(["w1 <image> w2"], [picture(0, family.size)], processor=processor)


@torch.no_grad()
def logits(model: nn.Module, inputs: Any) -> torch.Tensor:
    return model(**inputs).logits


# Lost handles


def test_nothing_is_found_on_a_plain_model():
    model = LLAVA.model()
    assert vltok.handles(model) == []
    with unchanged(model):
        vltok.remove(model)
    with pytest.raises(TypeError, match=r"handles\(\) takes a model \(torch.nn.Module\), got str"):
        vltok.handles("llava")


def test_handles_are_found_in_the_order_they_were_applied_and_removed_last_first():
    model = LLAVA.model()
    with unchanged(model):
        # The second one is about a part of what the first is about, and the third stands on top of the first.
        applied = [apply(model, "tap"), apply(model.model.vision_tower, "adl"), apply(model, "divprune")]
        assert vltok.handles(model) == applied
        assert vltok.handles(model.model.vision_tower) == applied[1:2]
        vltok.remove(model)
        assert not any(handle.is_attached for handle in applied)


def test_handles_may_leave_in_another_order_than_they_came():
    model = LLAVA.model()
    with unchanged(model):
        first, second = apply(model, "soft"), apply(model, "divprune")
        first.remove()
        assert vltok.handles(model) == [second]
        second.remove()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ModuleDict": lambda model: nn.ModuleDict({"policy": model, "reference": nn.Linear(1, 1)}),
    "PEFT": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_lost_handle_is_found_inside_a_wrapper_that_came_later(method, wrapper):
    model = LLAVA.model()
    apply(model, method)
    around = WRAPPERS[wrapper](model)
    (handle,) = vltok.handles(around)
    assert handle.methods[0].name == METHODS[method].name and handle.is_attached
    assert handle is vltok.handles(model)[0]
    del handle
    (again,) = vltok.handles(model)
    assert again.model is model
    vltok.remove(around)
    assert vltok.handles(around) == [] and not again.is_attached


def test_both_models_of_a_pair_are_found():
    pair = nn.ModuleList([LLAVA.model(), LLAVA.model(seed=1)])
    handles = [apply(model, "divprune") for model in pair]
    assert vltok.handles(pair) == handles
    vltok.remove(pair)
    assert vltok.handles(pair) == []


# Copies


@pytest.mark.parametrize(
    ("family", "twin_of"),
    [(LLAVA, copy.deepcopy), (LLAVA, saved), (LLAVA_NEXT, copy.deepcopy)],
    ids=["copy", "save", "next"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_copied_handle_acts_on_the_copy_alone(method, family, twin_of):
    model = family.model()
    if method == "tokenpacker" and family is LLAVA_NEXT:  # whose grid is odd
        handle = vltok.apply(model, vltok.TokenPacker(scale_factor=3), processor=family.processor())
    else:
        handle = apply(model, method, family)
    twin = twin_of({"handle": handle, "model": model})
    assert twin["handle"].model is twin["model"] and vltok.handles(twin["model"]) == [twin["handle"]]
    assert twin["handle"].processor is not handle.processor
    plain, state = family.model(), vars(handle.processor).copy()
    with unchanged(model):
        twin["handle"].remove()
        assert handle.is_attached and not twin["handle"].is_attached
        assert vars(handle.processor) == state
        assert [name for name, _ in twin["model"].named_modules()] == [name for name, _ in plain.named_modules()]
        inputs = inputs_of(family.processor(), family)
        assert torch.equal(logits(twin["model"], inputs), logits(plain, inputs))
        inputs = inputs_of(handle.processor, family)
    assert torch.isfinite(logits(model, inputs)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("twin_of", [copy.deepcopy, saved])
def test_a_copied_or_loaded_model_brings_its_handle(method, twin_of):
    model, plain = LLAVA.model(), LLAVA.model()
    handle = apply(model, method)
    inputs = inputs_of(handle.processor)
    twin, part = twin_of(model), twin_of(model.model)  # with the head and without
    expected = logits(model, inputs)
    assert torch.equal(logits(twin, inputs), expected)
    (found,) = vltok.handles(twin)
    assert found is not handle and found.methods == handle.methods and found.model is twin
    assert vltok.handles(part)[0].model is part
    for each in (twin, part):
        vltok.remove(each)
        assert vltok.handles(each) == []
    inputs = inputs_of(LLAVA.processor())
    assert torch.equal(logits(twin, inputs), logits(plain, inputs))
    assert handle.is_attached


def test_a_handle_kept_on_its_own_model_is_copied_with_it():
    model = LLAVA.model()
    model.handle = apply(model, "soft")
    for twin_of in (copy.deepcopy, saved):
        twin = twin_of(model)
        assert vltok.handles(twin) == [twin.handle] and twin.handle.model is twin


def test_what_is_known_for_all_calls_is_copied_and_losses_are_not():
    model = LLAVA.model().model.vision_tower.train()
    handle = vltok.apply(model, [vltok.SOFT(ratio=2, blocks=(0, 1)), vltok.ADL(blocks=(1, 2))])
    model(torch.rand(1, 3, *(2 * [model.config.image_size])))
    assert handle.loss().requires_grad
    for twin in (copy.deepcopy(handle), saved(handle)):
        report = twin.report(file=None)
        assert report.attention == handle.report(file=None).attention is not None
        assert report.diversification == Diversification((1, 2))
        assert twin.loss() == 0 and not twin.loss().requires_grad


# PEFT between apply and remove


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["multi_modal_projector", "vision_tower"]}], ids=str)
@pytest.mark.parametrize("end", ["stays", "unload", "merge_and_unload"])
@pytest.mark.parametrize("method", ["divprune", "fastervlm"])
def test_hooks_leave_a_model_that_peft_changed(method, end, options):
    model = LLAVA.model()
    handle = apply(model, method)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    if end != "stays":
        adapted = getattr(adapted, end)()
    handle.remove()
    left = [name for name, part in adapted.named_modules() if part._forward_hooks or part._forward_pre_hooks]
    assert left == [] and vltok.handles(adapted) == []


def test_a_projector_that_peft_wrapped_is_not_torn_out():
    model = LLAVA.model()
    handle = apply(model, "tokenpacker")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]))
    with (
        unchanged(adapted),
        pytest.raises(EditConflictError, match="'multi_modal_projector' of LlavaModel was changed"),
    ):
        handle.remove()
    assert handle.is_attached


# Other settings for a while


def current(handle: vltok.Handle) -> vltok.Method:
    """What the engine would ask for."""
    return handle._attachment.run.current(handle.methods[0])


def test_settings_change_in_a_block_and_come_back():
    handle = apply(LLAVA.model(), "divprune")
    with handle.using(keep_ratio=0.5):
        assert current(handle) == vltok.DivPrune(keep_ratio=0.5)  # in the place of num_keep
        with handle.using(positions="reindex"):
            assert current(handle) == vltok.DivPrune(keep_ratio=0.5, positions="reindex")
            with pytest.raises(KeyError), handle.using(num_keep=3):
                assert current(handle) == vltok.DivPrune(num_keep=3, positions="reindex")
                raise KeyError
        assert current(handle) == vltok.DivPrune(keep_ratio=0.5)
    assert current(handle) == handle.methods[0] == METHODS["divprune"]


def test_settings_change_for_one_thread():
    handle, seen = apply(LLAVA.model(), "divprune"), []
    with handle.using(num_keep=2):
        thread = threading.Thread(target=lambda: seen.append(current(handle)))
        thread.start()
        thread.join()
        assert current(handle).num_keep == 2
        assert current(copy.deepcopy(handle)).num_keep == 5
    assert seen == [METHODS["divprune"]]


def test_a_block_left_in_another_thread_or_out_of_order_is_left():
    handle = apply(LLAVA.model(), "divprune")

    def stream(num_keep):
        with handle.using(num_keep=num_keep):
            yield current(handle)

    outer, inner = stream(2), stream(3)
    assert [next(outer).num_keep, next(inner).num_keep] == [2, 3]
    thread = threading.Thread(target=outer.close)
    thread.start()
    thread.join()
    assert current(handle).num_keep == 3
    inner.close()
    assert current(handle).num_keep == 5


def test_a_setting_goes_to_every_method_that_has_it():
    method = vltok.ToDRE(keep_ratio=0.5, tau=0.2)
    handle = vltok.apply(LLAVA.model(), [vltok.TAP(), method])
    with handle.using(tau=0.3, strategy="k_center", num_keep=4, seed=1, pivot="center"):
        tap, todre = (handle._attachment.run.current(each) for each in handle.methods)
        assert tap == handle.methods[0]
        assert todre == vltok.ToDRE(num_keep=4, tau=0.3, strategy="k_center", seed=1, pivot="center")


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"keep_ratio": 2}, ValueError, r"in \(0, 1\], got 2"),
        ({"keep_ratio": "half"}, TypeError, "got 'half'"),
        ({"keep_ratio": 0.5, "num_keep": 3}, ValueError, "exactly one of keep_ratio and num_keep"),
        ({"num_keep": None}, ValueError, "got neither"),
        ({"tau": 7}, ValueError, r"in 0\.\.1"),
        (
            {"depth": 0.5},
            ValueError,
            "can't change depth of ToDRE for a block, it can change keep_ratio, num_keep, pos",
        ),
        ({"stages": (1,)}, ValueError, "can't change stages"),
        ({"relevance": False, "tau": 0.1}, ValueError, "can't change relevance"),
        ({"kep_ratio": 0.5}, ValueError, "can't change kep_ratio.*strategy, pivot, tau, seed"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_a_block_are_refused_at_once(knobs, error, message):
    handle = vltok.apply(LLAVA.model(), vltok.ToDRE(num_keep=4))
    with pytest.raises(error, match=message):
        handle.using(**knobs)
    assert current(handle) == handle.methods[0]


def test_methods_with_weights_have_nothing_to_change_in_a_block():
    handle = apply(LLAVA.model(), "soft")
    with pytest.raises(ValueError, match="can't change ratio of SOFT for a block, it can change nothing"):
        handle.using(ratio=4)
    handle.remove()
    with pytest.raises(ValueError, match="was removed"):
        handle.using()


# Results, thread by thread


def in_thread(function: Callable[[], Any]) -> Any:
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_a_thread_sees_its_own_call_and_without_one_the_latest():
    run = Run()
    assert run.last_results() == {}
    run.fact("attention", "everywhere")
    run.fact("diversification", "no call yet")
    in_thread(lambda: (run.report("pruning", "theirs"), run.loss("adl", torch.ones(()))))
    assert run.last_results() == {"attention": "everywhere", "diversification": "no call yet", "pruning": "theirs"}
    assert run.last_losses() == {"adl": 1}
    run.report("diversification", "mine")
    assert run.last_results() == {"attention": "everywhere", "diversification": "mine"}
    assert run.last_losses() == {}
    in_thread(lambda: run.report("pruning", "again"))
    assert "pruning" not in run.last_results()
    assert in_thread(run.last_results)["pruning"] == "again"


def test_taking_a_loss_back_hides_that_of_other_threads():
    run = Run()
    in_thread(lambda: run.loss("adl", torch.ones(())))
    run.losses.pop("adl", None)
    assert run.last_losses() == {}


def test_a_report_tells_no_images_from_no_call():
    handle = apply(LLAVA.model(), "divprune")
    assert str(handle.report(file=None)) == "no prompt with images since the method was attached"
    handle._attachment.run.report("pruning", Report(images=False))
    assert str(handle.report(file=None)) == "the last call had no images"
    handle = apply(LLAVA.model(), "soft")
    handle._attachment.run.report("pruning", Report(images=False))
    assert str(handle.report(file=None)).startswith("vision tower: ")
    assert str(handle.report(file=None)).endswith("\nthe last call had no images")


# Removal while calls are under way


class Slow:
    """A hook that lets the other threads know, and waits for them."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *args: Any) -> None:
        self.reached.set()
        assert self.go_on.wait(60)


@pytest.mark.parametrize("call", ["forward", "generate", "get_image_features"])
def test_removal_waits_for_the_calls_of_other_threads(call):
    model, slow, got = LLAVA.model(), Slow(), {}
    handle = apply(model, "soft")
    inputs = inputs_of(handle.processor)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "forward": lambda: logits(model, inputs),
        "generate": lambda: model.generate(**inputs, max_new_tokens=3, do_sample=False),
        "get_image_features": lambda: model.get_image_features(inputs["pixel_values"]).pooler_output[0],
    }
    expected = calls[call]()
    place = model.model.vision_tower.encoder.layers[1]
    hook = place.register_forward_pre_hook(slow)
    caller = threading.Thread(target=lambda: got.update(before=calls[call]()))
    caller.start()
    assert slow.reached.wait(60)
    with (
        pytest.raises(EditConflictError, match=r"still under way in thread .* after 0 s"),
        Calls(handle.host).paused(0.01),
    ):
        pass
    remover = threading.Thread(target=handle.remove)
    remover.start()
    while handle._attachment.calls._open.is_set():
        time.sleep(0.01)
    later = threading.Thread(target=lambda: got.update(after=logits(model, inputs)))
    later.start()
    time.sleep(0.1)
    assert handle.is_attached and got == {}
    slow.go_on.set()
    for thread in (caller, remover, later):
        thread.join()
    hook.remove()
    assert not handle.is_attached
    assert torch.equal(got["before"], expected)
    assert torch.equal(got["after"], logits(LLAVA.model(), inputs))


def test_a_handle_is_not_removed_from_inside_a_call():
    model = LLAVA.model()
    handle = apply(model, "soft")
    inputs = inputs_of(handle.processor)
    expected = logits(model, inputs)
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: handle.remove())
    with pytest.raises(EditConflictError, match="from inside one of its calls"):
        logits(model, inputs)
    hook.remove()
    assert handle.is_attached and torch.equal(logits(model, inputs), expected)
    with pytest.raises(EditConflictError, match="from inside one of its calls"):
        model.generate(**inputs, max_new_tokens=2, stopping_criteria=[lambda *_: handle.remove()])
    handle.remove()


def test_a_model_around_may_put_methods_on_for_one_call():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LLAVA.model()

        def forward(self, **inputs: Any) -> torch.Tensor:
            with apply(self.inner, "soft"):
                return logits(self.inner, inputs)

        generate = forward

    model, inputs = Around(), inputs_of(LLAVA.processor())
    assert torch.equal(model(**inputs), model.generate(**inputs))
    assert vltok.handles(model) == []


def test_an_interrupted_call_does_not_hold_a_removal_up():
    model = LLAVA.model()
    handle = apply(model, "soft")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.language_model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, inputs_of(handle.processor))
    hook.remove()
    handle.remove()
    assert not handle.is_attached


def test_threads_that_never_rest_do_not_hold_a_removal_up():
    model, answers, rest = LLAVA.model(), [], threading.Event()
    handle = apply(model, "soft")
    inputs = inputs_of(handle.processor)
    expected = logits(model, inputs), logits(LLAVA.model(), inputs)

    def work() -> None:
        while not rest.is_set():
            answers.append(logits(model, inputs))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(answers) < 4:
        time.sleep(0.01)
    handle.remove()
    rest.set()
    for thread in threads:
        thread.join()
    assert all(any(torch.equal(answer, each) for each in expected) for answer in answers)


# Families and texts


def test_methods_may_be_given_as_text():
    model = LLAVA.model()
    with vltok.apply(model, ["soft,ratio=2", vltok.StrideTokens(num_keep=3)]) as handle:
        assert [method.name for method in handle.methods] == ["soft", "stride"]
    with vltok.apply(model, "todre,keep_ratio=0.1") as handle:
        assert handle.methods == (vltok.ToDRE(keep_ratio=0.1),)


def test_supported_models_are_listed_by_kind():
    models = vltok.supported_models()
    assert {"llava", "qwen2_5_vl"} <= set(models["vlm"]) and {"clip", "timm_vit"} <= set(models["tower"])
    models["vlm"].clear()
    assert vltok.supported_models()["vlm"]


class IJepa(TowerFamily):
    """A family that vltok doesn't know by itself: a ViT of patches alone."""

    name = "ijepa"
    model_classes = ("IJepaModel",)
    first_norm = "layernorm_before"

    def num_prefix_tokens(self, tower: nn.Module) -> int:
        return 0


@pytest.fixture
def ijepa():
    module = sys.modules["families_of_mine"] = types.ModuleType("families_of_mine")
    module.IJepa = IJepa
    vltok.register_family("tower", "ijepa", "transformers.models.ijepa", "families_of_mine", "IJepa")
    yield
    del TOWERS["ijepa"], sys.modules["families_of_mine"]


def test_a_family_of_ones_own_can_be_registered(ijepa):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model, pixels = IJepaModel(IJepaConfig(**size, image_size=32, patch_size=8)).eval(), torch.rand(1, 3, 32, 32)
    before = model(pixels).last_hidden_state
    assert "ijepa" in vltok.supported_models()["tower"]
    with vltok.apply(model, vltok.SOFT(ratio=2)) as handle:
        assert handle.family == "ijepa"
        assert not torch.equal(model(pixels).last_hidden_state, before)
    assert torch.equal(model(pixels).last_hidden_state, before)


@pytest.mark.parametrize("kind", ["vlm", "tower"])
@pytest.mark.parametrize("name", ["llava", "clip"])
def test_a_family_is_not_registered_twice(kind, name):
    with pytest.raises(ValueError, match=f"a family named '{name}' is already registered"):
        vltok.register_family(kind, name, "somewhere", "mine", "Mine")
    with pytest.raises(ValueError, match="kind must be one of 'vlm', 'tower', got 'text'"):
        vltok.register_family("text", "mine", "somewhere", "mine", "Mine")


def test_stacks_of_all_threads_are_read_whole():
    """Also while threads run and leave generators: what was before a frame can't be asked later."""
    done, parked = threading.Event(), threading.Event()

    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        else:
            parked.set()
            done.wait()

    def spin() -> None:
        while not done.is_set():
            list(part for part in (each for each in range(9)))

    threads = [threading.Thread(target=deep, args=(30,)), *(threading.Thread(target=spin) for _ in range(3))]
    for thread in threads:
        thread.start()
    try:
        parked.wait()
        time.sleep(0.1)  # it goes on to wait
        expected = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[threads[0].ident])]
        for _ in range(50):
            found = dict(_stacks())
            assert found[threads[0].ident] == expected
            assert all(frame.f_code.co_name for frames in found.values() for frame in frames)
    finally:
        done.set()
        for thread in threads:
            thread.join()


STACKS_AMID_GARBAGE = """
import faulthandler, gc, threading
from vltok import calls

calls._DEEPEST = 5
faulthandler.dump_traceback_later(60, exit=True)


class Knot:
    def __init__(self):
        self.me, self.local = self, threading.local()
        self.local.value = 1


for allocations in range(1, 300):  # one of these collects amid the call, were it not kept from it
    gc.set_threshold(100_000, 100_000, 100_000)
    knots = [Knot() for _ in range(2)]
    knots.clear()
    gc.set_threshold(allocations, 100_000, 100_000)
    calls._stacks()
assert gc.isenabled()
"""


def test_stacks_are_read_while_garbage_waits():
    """Else `sys._current_frames` of Python 3.11 may collect what was local to threads, and wait for itself."""
    result = subprocess.run([sys.executable, "-c", STACKS_AMID_GARBAGE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
