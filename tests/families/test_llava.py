"""What is special to LLaVA-1.5: attention of CLIP and SigLIP towers, and features taken with or without [CLS]."""

from __future__ import annotations

import functools

import pytest
import reference
import tiny
import torch
from prompts import probe, row, single
from tiny import LLAVA, LLAVA_SIGLIP, shared_model
from transformers import Dinov2Config, LlavaForConditionalGeneration, LlavaProcessor

import vltok
from vltok.errors import UnsupportedModelError
from vltok.families.vlm.llava import Llava

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
IMAGES = "adjacent images"


@functools.lru_cache
def variant(**changes) -> torch.nn.Module:
    """The tiny LLaVA with another choice of tower features."""
    config = LLAVA.model().config
    for name, value in changes.items():
        setattr(config, name, list(value) if isinstance(value, tuple) else value)
    return tiny.sharpen(LlavaForConditionalGeneration(config))


def full_inputs(prompt: str, pictures):
    """Inputs of a model whose features keep the [CLS] token."""
    default = LLAVA.processor()
    processor = LlavaProcessor(
        image_processor=default.image_processor,
        tokenizer=default.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
    )
    return processor(text=[prompt], images=pictures, return_tensors="pt")


def tower_attention(family, inputs, layer: int) -> torch.Tensor:
    """The softmax map that the eager tower returns, mean over heads, (images, S, S)."""
    tower = shared_model(family, "eager").model.vision_tower
    return tower(inputs["pixel_values"], output_attentions=True).attentions[layer].mean(1)


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2, -3])
def test_cls_attention_is_the_row_that_the_eager_tower_returns(layer):
    inputs = single(LLAVA, IMAGES)
    (visual,) = probe(shared_model(LLAVA), inputs, "cls", layer)
    expected = tower_attention(LLAVA, inputs, layer)[:, 0, 1:]
    torch.testing.assert_close(visual.attention, expected, **CLOSE)
    assert visual.attention.amax(1).min() > 1.4 / 17, "the maps are too flat to tell tokens apart"


@pytest.mark.parametrize("layer", [0, -1, -2])
@pytest.mark.parametrize(("family", "prefix"), [(LLAVA, 1), (LLAVA_SIGLIP, 0)], ids=["clip", "siglip"])
def test_received_attention_is_the_column_sum_of_the_eager_map(family, prefix, layer):
    inputs = single(family, IMAGES)
    (visual,) = probe(shared_model(family), inputs, "received", layer)
    expected = tower_attention(family, inputs, layer).sum(1)[:, prefix:]
    torch.testing.assert_close(visual.attention, expected, **CLOSE)


@pytest.mark.parametrize("family", [LLAVA, LLAVA_SIGLIP], ids=["clip", "siglip"])
def test_a_selector_sees_the_projected_features_of_the_model(family):
    model, inputs = shared_model(family), single(family, IMAGES)
    (visual,) = probe(model, inputs)
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    assert torch.equal(visual.embeddings, torch.stack(list(features)))
    assert visual.attention is None
    assert visual.is_overview.all()


def test_image_keys_depend_on_the_pixels_alone():
    model = shared_model(LLAVA)
    (three,) = probe(model, single(LLAVA, IMAGES))
    (first,) = probe(model, single(LLAVA, "text around"))
    assert len(set(three.image_keys.tolist())) == 3
    assert three.image_keys[0] == first.image_keys[0]


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("family", [LLAVA, LLAVA_SIGLIP], ids=["clip", "siglip"])
def test_the_bare_language_model_on_gathered_embeddings_gives_the_same_logits(family, positions):
    model, whole = shared_model(family), row(shared_model(family), family, "two images")
    with vltok.apply(model, vltok.FasterVLM(keep_ratio=0.25, positions=positions)) as handle:
        pruned = model(**single(family, "two images")).logits[0]
        where = reference.kept(whole, handle.report(file=None).keep_indices[0])
    hidden = model.model.language_model(
        inputs_embeds=whole.embeds[where].unsqueeze(0),
        position_ids=(where if positions == "keep" else torch.arange(len(where))).unsqueeze(0),
        attention_mask=torch.ones(1, len(where), dtype=torch.long),
    ).last_hidden_state
    torch.testing.assert_close(pruned[where], model.lm_head(hidden)[0], rtol=1e-5, atol=1e-5)


def test_logits_of_a_dropped_token_are_those_of_the_last_kept_one_before_it():
    model, whole = shared_model(LLAVA), row(shared_model(LLAVA), LLAVA, "two images")
    with vltok.apply(model, vltok.StrideTokens(num_keep=3)) as handle:
        pruned = model(**single(LLAVA, "two images")).logits[0]
        where = reference.kept(whole, handle.report(file=None).keep_indices[0])
    for position in range(len(pruned)):
        assert torch.equal(pruned[position], pruned[where[where <= position].max()])


def test_features_that_keep_the_cls_token():
    model = variant(vision_feature_select_strategy="full")
    pictures = [tiny.picture(0), tiny.picture(1)]
    inputs = full_inputs("w1 <image> w2 <image> w3", pictures)
    assert (inputs["input_ids"] == 4).sum() == 34
    (visual,) = probe(model, inputs, "cls")
    assert visual.attention.shape == (2, 17)
    assert visual.attention[:, 0].tolist() == [-torch.inf] * 2, "[CLS] stands for no patch"
    torch.testing.assert_close(visual.attention[:, 1:], tower_attention(LLAVA, inputs, -1)[:, 0, 1:], **CLOSE)
    with vltok.apply(model, vltok.FasterVLM(num_keep=16)) as handle:
        model(**inputs)
        for kept in handle.report(file=None).keep_indices[0]:
            assert kept.tolist() == list(range(1, 17))


def test_features_of_several_tower_layers():
    model = variant(vision_feature_layer=(-2, -1))
    inputs = single(LLAVA, "two images")
    (visual,) = probe(model, inputs, "cls")
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    features = model.model.multi_modal_projector(torch.cat([hidden[-2], hidden[-1]], dim=-1)[:, 1:])
    assert torch.equal(visual.embeddings, features)
    with vltok.apply(model, vltok.ToDRE(keep_ratio=0.25)) as handle:
        pruned = model(**inputs).logits[0]
        picks = handle.report(file=None).keep_indices[0]
    expected, where = reference.logits(row(model, LLAVA, "two images"), picks)
    torch.testing.assert_close(pruned[where], expected, rtol=1e-5, atol=1e-5)


def test_what_the_tower_cannot_give_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"SiglipVisionModel has no \[CLS\] token"):
        vltok.apply(shared_model(LLAVA_SIGLIP), vltok.FasterVLM(keep_ratio=0.5, score="cls"))
    with pytest.raises(ValueError, match="the vision tower has 3 layers; there is no layer 3"):
        probe(shared_model(LLAVA), single(LLAVA, IMAGES), "cls", 3)
    config = LLAVA.model().config
    config.vision_config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    with pytest.raises(UnsupportedModelError, match="'dinov2' vision tower is not supported"):
        vltok.apply(LlavaForConditionalGeneration(config), vltok.RandomTokens(keep_ratio=0.5))


def test_a_fault_attention_of_the_neighbouring_patch_is_caught(monkeypatch):
    """The deliberate fault of this file: what the tower attends to is given to the patch beside it."""
    right = Llava.of_tokens

    def wrong(self, *args):
        return right(self, *args).roll(1)

    inputs = single(LLAVA, IMAGES)
    monkeypatch.setattr(Llava, "of_tokens", wrong)
    (visual,) = probe(shared_model(LLAVA), inputs, "cls")
    expected = tower_attention(LLAVA, inputs, -1)[:, 0, 1:]
    assert not torch.allclose(visual.attention, expected, atol=1e-2)
