"""What is special to Qwen2.5-VL: windows in the tower, pictures of any size, positions on three axes, videos."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from oracle import check_prefill_and_words
from prompts import CACHE, batch, generate, pictures, probe, row, rows, single
from tiny import QWEN2_5_VL, picture, shared_model

import vltok
from vltok.errors import UnsupportedModelError
from vltok.families.vlm import base

WINDOW = 2  # visual tokens along a window
PRUNE = vltok.ToDRE(keep_ratio=0.3, relevance=False)


def patch_places(grid: torch.Tensor) -> list[tuple[int, int, int]]:
    """(image, row, column) of every patch as the tower gets them: the four patches of a visual token stand together."""
    return [
        (image, 2 * y + dy, 2 * x + dx)
        for image, (_, height, width) in enumerate(grid.tolist())
        for y in range(height // 2)
        for x in range(width // 2)
        for dy in (0, 1)
        for dx in (0, 1)
    ]


def rotate(x: torch.Tensor, places: list[tuple[int, int, int]]) -> torch.Tensor:
    """Turn queries or keys (H, S, 16) by their row in one half of the frequencies and their column in the other."""
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    for patch, (_, y, wide) in enumerate(places):
        for pair in range(half):
            quarter = half // 2
            angle = (y if pair < quarter else wide) / 10000.0 ** (2 * (pair % quarter) / half)
            a, b = x[:, patch, pair], x[:, patch, pair + half]
            out[:, patch, pair] = a * math.cos(angle) - b * math.sin(angle)
            out[:, patch, pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def slow_attention(model, inputs) -> list[torch.Tensor]:
    """The softmax maps of all tower layers, (S, S) each, mean over heads, in the order of the patches.

    Nothing is permuted: a window is a mask here. Also checks itself: the features come out as the model's own.
    """
    visual, grid = model.model.visual, inputs["image_grid_thw"]
    places = patch_places(grid)
    size = 2 * WINDOW
    windows = [(image, y // size, x // size) for image, y, x in places]
    maps = []
    x = visual.patch_embed(inputs["pixel_values"])
    for number, block in enumerate(visual.blocks):
        zones = [image for image, _, _ in places] if number in visual.fullatt_block_indexes else windows
        zones = torch.tensor([sorted(set(zones)).index(zone) for zone in zones])
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 16)).permute(1, 2, 0, 3)  # (H, S, 16) each
        logits = rotate(q, places) @ rotate(k, places).mT / 4
        weights = logits.masked_fill(zones[:, None] != zones, -torch.inf).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
        maps.append(weights.mean(0))
    own = visual(inputs["pixel_values"], grid_thw=grid).pooler_output
    torch.testing.assert_close(visual.merger(x), own, rtol=1e-4, atol=1e-4)
    return maps


def check_received(layer: int) -> None:
    model, inputs = shared_model(QWEN2_5_VL), single(QWEN2_5_VL, "two images")
    weights = slow_attention(model, inputs)[layer]
    counts = inputs["image_grid_thw"].prod(-1).tolist()
    starts = [0, *np.cumsum(counts).tolist()]
    for visual, (a, b) in zip(probe(model, inputs, "received", layer), pairwise(starts), strict=True):
        received = weights[a:b, a:b].sum(0)
        assert received.mean() == pytest.approx(1, abs=1e-5)
        expected = torch.stack([received[four : four + 4].mean() for four in range(0, b - a, 4)])
        torch.testing.assert_close(visual.attention[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2])
def test_received_attention_equals_a_masked_softmax_without_any_permutation(layer):
    check_received(layer)


def test_a_selector_sees_the_merged_features_in_the_order_of_the_placeholders():
    model, inputs = shared_model(QWEN2_5_VL), single(QWEN2_5_VL, "two images")
    seen = probe(model, inputs)
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    assert [visual.embeddings.shape[1] for visual in seen] == [15, 12]
    for visual, feature in zip(seen, features.pooler_output, strict=True):
        assert torch.equal(visual.embeddings[0], feature)
        assert visual.is_overview.all()


def test_image_keys_depend_on_the_pixels_alone():
    model = shared_model(QWEN2_5_VL)
    _, second = probe(model, single(QWEN2_5_VL, "two images"))
    (alone,) = probe(model, QWEN2_5_VL.inputs(["<image> w9"], [picture(1, QWEN2_5_VL.size)]))
    assert second.image_keys.tolist() == alone.image_keys.tolist()
    (other,) = probe(model, QWEN2_5_VL.inputs(["<image> w9"], [picture(2, QWEN2_5_VL.size)]))
    assert other.image_keys.tolist() != alone.image_keys.tolist()


def record_positions(model, run) -> list[torch.Tensor]:
    """The position_ids that reach the language model while `run()` runs."""
    seen = []
    spy = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    run()
    spy.remove()
    return seen


@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_tokens_keep_their_positions_on_all_three_axes(side):
    model, inputs = shared_model(QWEN2_5_VL), batch(QWEN2_5_VL, side)
    with vltok.apply(model, PRUNE) as handle:
        (positions,) = record_positions(model, lambda: model(**inputs))
        picks = handle.report(file=None).keep_indices
    assert positions.shape[0] == 3
    for index, whole in enumerate(rows(model, QWEN2_5_VL)):
        where = reference.kept(whole, picks[index])
        end = positions.shape[-1] - int(not inputs.attention_mask[index, -1])  # the last column is a slot in any case
        assert torch.equal(positions[:, index, end - len(where) : end], whole.positions[:, where])
    assert (positions[1] != positions[2]).any(), "rows and columns must differ for this to say anything"


def test_decoding_goes_on_where_the_prompt_ended():
    model, inputs = shared_model(QWEN2_5_VL), single(QWEN2_5_VL, "two images")
    whole = row(model, QWEN2_5_VL, "two images")
    with vltok.apply(model, PRUNE) as handle:
        prefill, *steps = record_positions(model, lambda: generate(model, inputs, steps=4))
        where = reference.kept(whole, handle.report(file=None).keep_indices[0])
    assert prefill.shape == (4, 1, len(where))
    assert torch.equal(prefill[1:, 0], whole.positions[:, where])
    for number, step in enumerate(steps):
        assert step[1:].flatten().tolist() == [whole.next_position + number] * 3


def test_beams_agree_with_and_without_a_cache():
    model, inputs = shared_model(QWEN2_5_VL), batch(QWEN2_5_VL)
    options = {"num_beams": 3, "num_return_sequences": 3}
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=1.0)):
        words = generate(model, inputs, **options)
        assert torch.equal(generate(model, inputs, use_cache=False, **options), words)
    assert len(words.unique(dim=0)) > 4


@pytest.mark.parametrize("size", [0, 1])
def test_text_after_a_prompt_that_ends_with_the_last_placeholder(size):
    """A wide or tall image reaches further on one axis than on another; text goes on behind the farthest."""
    model, family = shared_model(QWEN2_5_VL), QWEN2_5_VL
    image = picture(0, (family.size, family.other_size)[size])
    inputs = family.processor()(text=["w1 <|vision_start|><|image_pad|>"], images=[image], return_tensors="pt")
    closed = reference.read(model, family, "w1 <image>", [image])
    last = len(closed.embeds) - 1  # without the closing token
    whole = reference.Row(
        closed.embeds[:last], closed.positions[:, :last], closed.visual[:last], closed.images, closed.lm, closed.head
    )
    assert len(whole.positions[:, -1].unique()) > 1
    with vltok.apply(model, PRUNE) as handle:
        cache = model(**inputs, use_cache=True)[CACHE]
        picks = handle.report(file=None).keep_indices[0]
        logits = model(input_ids=torch.tensor([[7, 10, 11]]), **{CACHE: cache}).logits[0]
    expected = reference.logits(reference.extend(whole, model, [7, 10, 11]), picks)[0][-3:]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_pictures_of_any_size_in_one_batch():
    model, family = shared_model(QWEN2_5_VL), QWEN2_5_VL
    sizes = [(8, 8), (64, 24), (16, 56), (40, 40)]
    images = [picture(seed, size) for seed, size in enumerate(sizes)]
    with vltok.apply(model, vltok.FasterVLM(keep_ratio=0.5)) as handle:
        model(**family.inputs(["<image> w1 <image>", "w2", "w3 <image><image> w4"], images))
        together = handle.report(file=None)
        assert together.visual_tokens == [[1, 24], [], [14, 25]]
        kept = [indices.tolist() for indices in together.keep_indices[0] + together.keep_indices[2]]
        for image, expected in zip(images, kept, strict=True):
            model(**family.inputs(["w5 <image>"], [image]))
            assert handle.report(file=None).keep_indices[0][0].tolist() == expected


def test_videos_are_pruned_alone_and_beside_images():
    model, processor = QWEN2_5_VL.model("eager"), QWEN2_5_VL.processor()
    frames = np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
    text = "<|vision_start|><|video_pad|><|vision_end|>"
    options = {"videos_kwargs": {"do_sample_frames": False}, "return_tensors": "pt"}
    alone = processor(text=[f"w1 {text} w2"], videos=[frames], **options)
    mixed = processor(
        text=[f"w1 {text} w2 {QWEN2_5_VL.image} w3"],
        images=pictures(QWEN2_5_VL, "text around"),
        videos=[frames],
        **options,
    )
    for inputs, tokens in ((alone, [24]), (mixed, [24, 12])):
        check_prefill_and_words(model, QWEN2_5_VL, inputs, PRUNE)
        with vltok.apply(model, PRUNE) as handle:
            model(**inputs)
            assert handle.report(file=None).visual_tokens == [tokens]


def test_what_this_family_cannot_do_is_refused():
    model = shared_model(QWEN2_5_VL)
    with pytest.raises(ValueError, match="positions on several axes, which can't be counted anew"):
        vltok.apply(model, vltok.StrideTokens(num_keep=2, positions="reindex"))
    with pytest.raises(UnsupportedModelError, match=r"has no \[CLS\] token"):
        vltok.apply(model, vltok.FasterVLM(num_keep=2, score="cls"))


def test_a_fault_attention_left_in_window_order_is_caught(monkeypatch):
    """The deliberate fault of this file: what a window attends to is given to the tokens in its order."""
    right = base.get_vision_window_index

    def wrong(*args, **kwargs):
        order, bounds = right(*args, **kwargs)
        return order.sort().values, bounds

    monkeypatch.setattr(base, "get_vision_window_index", wrong)
    with pytest.raises(AssertionError, match="not close"):
        check_received(-1)
