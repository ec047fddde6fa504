"""What is special to InternVL: tiles with a thumbnail behind them, and four patches merged into one token."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import reference
import tiny
import torch
from prompts import batch, generate, probe, row, single
from tiny import INTERNVL, picture, shared_model
from transformers import GotOcr2ImageProcessor, InternVLForConditionalGeneration, InternVLVisionConfig

import vltok
from vltok.families.vlm.internvl import InternVL
from vltok.visual import VisualTokens

SIDE, TOKENS = 8, 16  # patches along a tile, tokens of a tile
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@functools.lru_cache
def plain_norms(attention: str) -> torch.nn.Module:
    """Without norms on queries and keys, as in the smaller checkpoints."""
    config = INTERNVL.build(attention).config
    tower = {"use_qk_norm": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6}
    config.vision_config = InternVLVisionConfig(**tiny.TOWER, image_size=56, patch_size=7, **tower)
    config._attn_implementation = attention
    return tiny.sharpen(InternVLForConditionalGeneration(config))


def patches_behind(model, pixels: torch.Tensor, token: int) -> list[int]:
    """The patches of a tile that a visual token is made from: those with a gradient."""
    rows = []
    hook = model.model.vision_tower.layernorm.register_forward_hook(
        lambda module, args, output: rows.append(output.detach().requires_grad_()) or rows[-1]
    )
    with torch.enable_grad():
        features = model.model.get_image_features(pixels[:1], return_dict=True).pooler_output
        (gradient,) = torch.autograd.grad(features[0, token].square().sum(), rows[0])
    hook.remove()
    return gradient[0, 1:].abs().sum(-1).nonzero().squeeze(1).tolist()


def merged(attention: torch.Tensor) -> torch.Tensor:
    """Mean over each 2 x 2 block of a tile's patches, (R, 64) -> (R, 16), one number at a time."""
    out = torch.zeros(len(attention), TOKENS)
    for tile, values in enumerate(attention):
        for y in range(SIDE // 2):
            for x in range(SIDE // 2):
                block = [values[(2 * y + dy) * SIDE + 2 * x + dx] for dy in (0, 1) for dx in (0, 1)]
                out[tile, y * SIDE // 2 + x] = sum(block) / 4
    return out


def check_attention(model, eager, kind: str, layer: int) -> None:
    inputs = single(INTERNVL, "two images")  # one tile; two tiles and a thumbnail
    one, three = probe(model, inputs, kind, layer)
    maps = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[layer].mean(1)
    expected = merged((maps[:, 0] if kind == "cls" else maps.sum(1))[:, 1:])
    torch.testing.assert_close(one.attention, expected[:1], **CLOSE)
    torch.testing.assert_close(three.attention, expected[1:].reshape(1, -1), **CLOSE)


@pytest.mark.parametrize("kind", ["cls", "received"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_of_a_token_is_the_mean_over_its_four_patches(kind, layer):
    check_attention(shared_model(INTERNVL), shared_model(INTERNVL, "eager"), kind, layer)


def test_attention_without_norms_on_queries_and_keys():
    check_attention(plain_norms("sdpa"), plain_norms("eager"), "cls", -1)


@pytest.mark.parametrize("token", [0, 1, 4, 11, 15])
def test_the_four_patches_are_those_the_model_merges(token):
    """Which also says that tokens of a tile go row by row, as `merged` has them."""
    y, x = divmod(token, SIDE // 2)
    expected = sorted((2 * y + dy) * SIDE + 2 * x + dx for dy in (0, 1) for dx in (0, 1))
    pixels = single(INTERNVL, "image first")["pixel_values"]
    assert patches_behind(shared_model(INTERNVL), pixels, token) == expected


def test_the_last_tile_is_the_thumbnail_and_a_single_tile_is_the_picture():
    image = picture(0, INTERNVL.size)
    inputs = INTERNVL.inputs(["w1 <image>"], [image])
    whole = GotOcr2ImageProcessor(size={"height": 56, "width": 56})(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"][-1:], whole)
    (three,) = probe(shared_model(INTERNVL), inputs)
    assert three.is_overview[0].tolist() == [False] * 2 * TOKENS + [True] * TOKENS
    (one,) = probe(shared_model(INTERNVL), single(INTERNVL, "image first"))
    assert one.is_overview.all() and one.is_overview.shape == (1, TOKENS)


def test_an_image_is_a_run_of_placeholders_also_where_images_touch():
    model = shared_model(INTERNVL)
    with vltok.apply(model, vltok.StrideTokens(keep_ratio=0.25)) as handle:
        model(**batch(INTERNVL, names=["adjacent images", "image first", "text only", "two images"]))
        report = handle.report(file=None)
        assert report.visual_tokens == [[48, 16, 48], [16], [], [16, 48]]
        assert report.kept_tokens == [[12, 4, 12], [4], [], [4, 12]]
        generate(model, single(INTERNVL, "adjacent images"), num_beams=2)
        assert handle.report(file=None).visual_tokens == [[48, 16, 48]] * 2


def test_a_selector_sees_the_projected_features_tile_after_tile():
    model, inputs = shared_model(INTERNVL), single(INTERNVL, "two images")
    one, three = probe(model, inputs)
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    assert torch.equal(one.embeddings, features[:1])
    assert torch.equal(three.embeddings[0], features[1:].flatten(0, 1))
    (again,) = probe(model, INTERNVL.inputs(["<image> w9"], [picture(1, INTERNVL.size)]))
    assert again.image_keys.tolist() == three.image_keys.tolist()


def test_the_pivot_is_in_the_thumbnail():
    model, inputs = shared_model(INTERNVL), single(INTERNVL, "text around")
    (visual,) = probe(model, inputs, "cls")
    with vltok.apply(model, vltok.ToDRE(num_keep=1)) as handle:
        model(**inputs)
        (pivot,) = handle.report(file=None).keep_indices[0][0].tolist()
    assert pivot == 2 * TOKENS + int(visual.attention[0, 2 * TOKENS :].argmax())


def test_frames_of_a_video_are_pruned_like_images():
    model, processor = shared_model(INTERNVL), INTERNVL.processor()
    frames = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    inputs = processor(text=["w1 <video> w2"], videos=[frames], return_tensors="pt")
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.25, relevance=False)) as handle:
        pruned = model(**inputs).logits[0]
        picks = handle.report(file=None).keep_indices[0]
        assert handle.report(file=None).visual_tokens == [[TOKENS] * 3]
    whole = row(model, INTERNVL, "text only")  # for its language model; the rest is put together here
    visual = inputs["input_ids"][0] == model.config.image_token_id
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    embeds = model.get_input_embeddings()(inputs["input_ids"])[0].masked_scatter(visual[:, None], features)
    images = list(visual.nonzero().squeeze(1).split(TOKENS))
    video = reference.Row(embeds, torch.arange(len(embeds)), visual, images, whole.lm, whole.head)
    expected, where = reference.logits(video, picks)
    torch.testing.assert_close(pruned[where], expected, rtol=1e-5, atol=1e-5)


def test_a_fault_patches_merged_in_a_row_are_caught(monkeypatch):
    """The deliberate fault of this file: four patches side by side taken for a 2 x 2 block."""

    def wrong(self, model, encoding, name, fill):
        return encoding.of_tower(name)[:, 1:].unflatten(1, (-1, 4)).mean(-1).flatten()

    model = shared_model(INTERNVL)
    right: VisualTokens = probe(model, single(INTERNVL, "image first"), "cls")[0]
    monkeypatch.setattr(InternVL, "of_tokens", wrong)
    assert probe(model, single(INTERNVL, "image first"), "cls")[0].attention.shape == right.attention.shape
    with pytest.raises(AssertionError):
        check_attention(model, shared_model(INTERNVL, "eager"), "cls", -1)
