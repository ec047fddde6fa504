"""Calls of one model don't see each other, whoever breaks them off, for every method on every family."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from calls import PROMPTS, batch, fingerprint, generate, logits, single
from oracle import decoder_of
from rows import dropping_too, few, few_pruning
from torch.nn.modules.module import register_module_forward_pre_hook

from vltok.errors import VltokError


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Let threads take turns as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@dropping_too
def test_threads_get_the_answers_of_single_calls(pair, model, busy_threads):
    rows = range(len(PROMPTS))
    inputs = [single(pair, row) for row in rows]
    with pair.apply(model) as handle:

        def answer(row: int) -> tuple:
            words = generate(model, inputs[row], steps=2).tolist()
            scores = logits(model, inputs[row], use_cache=False)
            report = handle.report(file=None)
            return words, scores, report.visual_tokens, report.kept_tokens

        expected = [answer(row) for row in rows]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda call: answer(call % len(rows)), range(8)))
    for call, (words, scores, *report) in enumerate(answers):
        right = expected[call % len(rows)]
        assert words == right[0]
        assert torch.equal(scores, right[1])
        assert tuple(report) == right[2:]


def points(model: torch.nn.Module, inputs: dict) -> int:
    """How many modules a call runs."""
    count = 0

    def hook(module, args):
        nonlocal count
        count += 1

    handle = register_module_forward_pre_hook(hook)
    try:
        logits(model, inputs)
    finally:
        handle.remove()
    return count


def at_point(number: int, action) -> torch.utils.hooks.RemovableHandle:
    """Run `action` before the module that a call runs as its `number`-th; once."""
    count = 0

    def hook(module, args):
        nonlocal count
        count += 1
        if count == number:
            action()

    return register_module_forward_pre_hook(hook)


@few
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_call_in_the_middle_of_another_changes_neither(pair, model, share):
    outer, inner = single(pair, 1), single(pair, 0)
    with pair.apply(model) as handle:
        expected, other = logits(model, outer), logits(model, inner)
        seen = []
        logits(model, outer)
        right = handle.report(file=None).kept_tokens
        number = int(share * points(model, outer)) + 1
        hook = at_point(number, lambda: seen.append(logits(model, inner)))
        try:
            got = logits(model, outer)
        finally:
            hook.remove()
        assert handle.report(file=None).kept_tokens == right
    assert torch.equal(seen[0], other)
    assert torch.equal(got, expected)


@few
def test_an_interrupt_at_any_point_leaves_nothing_behind(pair, model):
    inputs, text = batch(pair), decoder_of(model, pair.family)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(9, 40, inputs["input_ids"].shape, generator=generator)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(words)
        alone = text(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pair.apply(model) as handle, torch.no_grad():
        expected = logits(model, inputs)
        told = handle.report(file=None).kept_tokens
        mark = fingerprint(model)
        total = points(model, inputs)
        numbers = sorted({2, total, *range(total // 8, total, total // 6)})
        for number in numbers:
            hook = at_point(number, interrupt)
            try:
                with pytest.raises(KeyboardInterrupt):
                    model(**inputs)
            finally:
                hook.remove()
            assert torch.equal(text(inputs_embeds=embeds, use_cache=False).last_hidden_state, alone)
            assert handle.report(file=None).kept_tokens == told
        assert fingerprint(model) == mark
        assert torch.equal(logits(model, inputs), expected)


@dropping_too
def test_an_answer_given_up_half_way_leaves_nothing_behind(pair, model):
    """A client hangs up: the streamer raises while generate() is at work."""

    class Line:
        def __init__(self) -> None:
            self.words = 0

        def put(self, value) -> None:
            self.words += 1
            if self.words == 3:
                raise ConnectionError

        def end(self) -> None:
            pass

    with pair.apply(model):
        expected = generate(model, single(pair, 0))
        with pytest.raises(ConnectionError):
            generate(model, single(pair, 0), streamer=Line())
        assert torch.equal(generate(model, single(pair, 0)), expected)


@few_pruning
def test_a_handle_removed_while_another_thread_generates(pair, model):
    inputs, got, begun = single(pair, 1), {}, threading.Event()

    def slow(module, args):
        begun.set()
        time.sleep(0.03)

    with pair.apply(model):
        expected = generate(model, inputs, steps=8)

    def work() -> None:
        try:
            got["answer"] = generate(model, inputs, steps=8)
        except VltokError as error:
            got["refused"] = error

    handle = pair.apply(model)
    hook = model.register_forward_pre_hook(slow)
    thread = threading.Thread(target=work)
    try:
        thread.start()
        begun.wait(10)
        time.sleep(0.1)
        handle.remove()
        thread.join()
    finally:
        hook.remove()
        handle.remove()
    assert "refused" in got or torch.equal(got["answer"], expected)


@few
def test_the_report_is_of_this_threads_last_call(pair, model):
    """A thread without a call of its own sees the latest of any: a server's main thread asks about its worker."""
    with pair.apply(model) as handle:
        logits(model, single(pair, 1))
        mine = handle.report(file=None).visual_tokens
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: handle.report(file=None).visual_tokens).result() == mine
            pool.submit(lambda: logits(model, single(pair, 0))).result()
            theirs = pool.submit(lambda: handle.report(file=None).visual_tokens).result()
        assert handle.report(file=None).visual_tokens == mine
        assert not pair.prunes or theirs != mine


@few_pruning
def test_the_report_says_when_a_call_had_no_images(pair, model):
    with pair.apply(model) as handle:
        logits(model, single(pair, 1))
        logits(model, single(pair, 2))
        report = handle.report(file=None)
    assert not any(report.visual_tokens)
    assert "no image" in str(report)
