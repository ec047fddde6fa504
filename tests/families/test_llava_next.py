"""What is special to LLaVA-NeXT: a thumbnail, crops laid out as one map without its padding, newline tokens."""

from __future__ import annotations

import inspect

import pytest
import reference
import torch
from prompts import PROMPTS, batch, generate, pictures, probe, row, rows, single
from tiny import LLAVA_NEXT, PINPOINTS, picture, shared_model

import vltok
from vltok.families.vlm import llava_next

SIDE = 3  # patches along a crop of 42 pixels
SIZES = [(84, 50), (42, 84), (60, 60), (84, 84), (100, 30), (30, 100), (90, 7), (13, 84)]  # (width, height)


def layout(width: int, height: int) -> list[tuple[int, int] | None]:
    """Where each visual token comes from: (crop, patch), crop 0 being the thumbnail, or None for a newline.

    Written from the description of AnyRes: the grid that shows most of the picture (then wastes least) is filled with
    the picture in its proportions, centred; whole rows or columns of patches that show padding only are left out.
    """

    def use(grid: list[int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, -(grid[0] * grid[1] - shown)

    best = max(PINPOINTS, key=use)
    crops_down, crops_across = best[0] // 42, best[1] // 42
    down, across = crops_down * SIDE, crops_across * SIDE
    top = left = 0
    if width / height > across / down:
        top = (down - int(round(height * across / width, 7))) // 2
    else:
        left = (across - int(round(width * down / height, 7))) // 2
    tokens: list[tuple[int, int] | None] = [(0, patch) for patch in range(SIDE * SIDE)]
    for y in range(top, down - top):
        for x in range(left, across - left):
            crop = 1 + (y // SIDE) * crops_across + x // SIDE
            tokens.append((crop, (y % SIDE) * SIDE + x % SIDE))
        tokens.append(None)
    return tokens


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_token_is_the_crop_patch_or_newline_the_layout_says(size):
    model, eager = shared_model(LLAVA_NEXT), shared_model(LLAVA_NEXT, "eager")
    inputs = LLAVA_NEXT.inputs(["w1 <image> w2"], [picture(3, size)])
    (visual,) = probe(model, inputs, "cls")
    tokens = layout(*size)
    assert visual.embeddings.shape[1] == len(tokens)
    crops = inputs["pixel_values"][0]
    output = eager.model.vision_tower(crops, output_hidden_states=True, output_attentions=True)
    features = eager.model.multi_modal_projector(output.hidden_states[-2][:, 1:])
    attention = output.attentions[-1].mean(1)[:, 0, 1:]
    for index, source in enumerate(tokens):
        embedding = model.model.image_newline if source is None else features[source]
        torch.testing.assert_close(visual.embeddings[0, index], embedding, rtol=1e-5, atol=1e-5)
        expected = torch.tensor(-torch.inf) if source is None else attention[source]
        torch.testing.assert_close(visual.attention[0, index], expected, rtol=1e-5, atol=1e-6)
        assert visual.is_overview[0, index] == (source is not None and source[0] == 0)


def test_what_reaches_the_language_model_is_the_packed_feature_of_each_kept_index():
    model = shared_model(LLAVA_NEXT)
    inputs = single(LLAVA_NEXT, "adjacent images")
    names = ("pixel_values", "image_sizes")
    packed = model.model.get_image_features(**{k: inputs[k] for k in names}, return_dict=True).pooler_output
    seen = []
    with vltok.apply(model, vltok.FasterVLM(keep_ratio=0.3)) as handle:
        spy = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        model(**inputs)
        spy.remove()
        kept = handle.report(file=None).keep_indices[0]
    words = model.get_input_embeddings()(torch.tensor([6, 7, 8]))  # w1 [image][image] w2 [image] w3
    first, second, third = (feature[index] for feature, index in zip(packed, kept, strict=True))
    assert torch.equal(seen[0], torch.cat([words[:1], first, second, words[1:2], third, words[2:]]))


def test_newlines_are_never_ranked_and_the_pivot_is_in_the_thumbnail():
    model, inputs = shared_model(LLAVA_NEXT), single(LLAVA_NEXT, "text around")
    tokens = layout(*LLAVA_NEXT.size)
    patches = [index for index, source in enumerate(tokens) if source is not None]
    with vltok.apply(model, vltok.FasterVLM(num_keep=len(patches))) as handle:
        model(**inputs)
        assert handle.report(file=None).keep_indices[0][0].tolist() == patches
    with vltok.apply(model, vltok.ToDRE(num_keep=1)) as handle:
        model(**inputs)
        (pivot,) = handle.report(file=None).keep_indices[0][0].tolist()
    (visual,) = probe(model, inputs, "cls")
    assert pivot == int(visual.attention[0, : SIDE * SIDE].argmax())


@pytest.mark.parametrize("method", [vltok.ToDRE(keep_ratio=0.3), vltok.FasterVLM(keep_ratio=0.3)], ids=repr)
def test_generate_and_forward_agree_though_generate_encodes_first(method):
    model, inputs = shared_model(LLAVA_NEXT), batch(LLAVA_NEXT)
    reports = []
    with vltok.apply(model, method) as handle:
        logits = model(**inputs).logits[:, -1]
        reports.append(handle.report(file=None))
        words = generate(model, inputs, steps=1)
        reports.append(handle.report(file=None))
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    assert words[:, 0].tolist() == logits.argmax(-1).tolist()
    assert reports[0].visual_tokens == reports[1].visual_tokens == [[33, 37], [37], [33], []]
    for forward, generated in zip(reports[0].keep_indices, reports[1].keep_indices, strict=True):
        assert list(map(torch.Tensor.tolist, forward)) == list(map(torch.Tensor.tolist, generated))


def test_a_batch_of_pictures_with_different_numbers_of_crops_equals_the_reference():
    model = shared_model(LLAVA_NEXT)
    names = ["adjacent images", "image first", "two images"]
    inputs = batch(LLAVA_NEXT, names=names)
    assert inputs["pixel_values"].shape[:2] == (6, 5), "the processor fills up to five crops"
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.3)) as handle:
        pruned = model(**inputs).logits
        picks = handle.report(file=None).keep_indices
    for index, whole in enumerate(rows(model, LLAVA_NEXT, names)):
        expected, where = reference.logits(whole, picks[index])
        mine = pruned[index][inputs["attention_mask"][index].bool()]
        torch.testing.assert_close(mine[where], expected, rtol=1e-5, atol=1e-5)


def test_the_image_encoder_keeps_its_signature_and_its_answers():
    model = shared_model(LLAVA_NEXT)
    plain = model.model.get_image_features
    inputs = single(LLAVA_NEXT, "two images")
    expected = plain(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output
    with vltok.apply(model, vltok.RandomTokens(keep_ratio=0.5)):
        watched = model.model.get_image_features
        assert watched != plain
        assert inspect.signature(watched) == inspect.signature(plain)
        answers = watched(inputs["pixel_values"], image_sizes=inputs["image_sizes"], return_dict=True).pooler_output
        assert all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))
    assert "get_image_features" not in vars(model.model)


@pytest.mark.parametrize("name", [name for name, (_, sizes) in PROMPTS.items() if sizes])
def test_the_processor_and_the_layout_count_alike(name):
    model = shared_model(LLAVA_NEXT)
    with vltok.apply(model, vltok.StrideTokens(num_keep=2)) as handle:
        model(**single(LLAVA_NEXT, name))
        counts = handle.report(file=None).visual_tokens[0]
    assert counts == [len(layout(*image.size)) for image in pictures(LLAVA_NEXT, name)]
    assert row(model, LLAVA_NEXT, name).visual.sum() == sum(counts)


def test_a_fault_newlines_forgotten_in_the_map_are_caught(monkeypatch):
    """The deliberate fault of this file: attention is read off as if the crops stood one after another."""
    model, inputs = shared_model(LLAVA_NEXT), single(LLAVA_NEXT, "text around")
    right = probe(model, inputs, "cls")[0].attention

    def wrong(self, model, encoding, name, fill):
        return encoding.of_tower(name)[:, 1:].flatten()[: sum(encoding.lengths)]

    monkeypatch.setattr(llava_next.LlavaNext, "of_tokens", wrong)
    shifted = probe(model, inputs, "cls")[0].attention
    with pytest.raises(AssertionError):
        torch.testing.assert_close(shifted, right, rtol=1e-5, atol=1e-6)
    assert torch.equal(shifted[:, : SIDE * SIDE], right[:, : SIDE * SIDE])
