"""Windows count the tokens a prompt had, also long after it: twenty words behind prompts longer than the window."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import tiny
from tiny import TinyFamily, clip, picture, shared_model
from zoo import gemma, glm, late, qwen, tiles

import vltok

KNOWN = [*tiny.ALL, *tiny.WINDOWED, *qwen.ROWS, *gemma.ROWS, *glm.ROWS, *late.ROWS, *tiles.ROWS]
WINDOWED = list({row.key: row for row in KNOWN if row.windowed}.values())
STEPS = 20
TEXT = " ".join(f"w{n}" for n in range(1, tiny.WINDOW + 4))
METHODS = {
    "stride": vltok.StrideTokens(keep_ratio=0.3),
    "todre": vltok.ToDRE(keep_ratio=0.5, stages=(1,), pivot="farthest"),
}


def check(family: TinyFamily, inputs: Any, method: vltok.Method) -> None:
    model = shared_model(family, "eager")
    if oracle.counts_slots(oracle.decoder_of(model, family)):
        pytest.skip("a state or blocks of keys run through padding, so an oracle that hides keys says something else")
    assert not inputs["attention_mask"].all() and inputs["attention_mask"].sum(1).min() > tiny.WINDOW
    oracle.check_prefill_and_words(model, family, inputs, method, STEPS)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", WINDOWED, ids=lambda family: family.key)
def test_twenty_words_behind_a_padded_batch_see_their_windows(family: TinyFamily, method: vltok.Method):
    prompts = [f"{TEXT} <image> w1 <image> {TEXT}", f"w2 <image> {TEXT}", "w3 <image> w4"]
    pictures = [picture(n, family.other_size if n == 1 else family.size) for n in range(4)]
    check(family, family.inputs(prompts, pictures), method)


@pytest.mark.parametrize("family", [row for row in WINDOWED if row.video], ids=lambda family: family.key)
def test_twenty_words_behind_a_padded_batch_of_videos_see_their_windows(family: TinyFamily):
    prompts = [f"w2 <video> {TEXT}", "w3 <video> w4"]
    videos = [clip(n, family.size, family.frames) for n in range(2)]
    check(family, family.inputs(prompts, videos=videos), METHODS["stride"])
