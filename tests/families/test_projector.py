"""Replacing the projector: what reaches it, what the processor writes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prompts import probe, single
from tiny import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, LLAVA_SIGLIP, QWEN2_5_VL, picture, shared_model, sharpen
from torch import nn
from unchanged import unchanged
from zoo import tiles

import vltok
from vltok.errors import UnsupportedModelError

WORDS = ["w1 <image> w2", "<image> w3 <image>"]
PACKER = vltok.TokenPacker(scale_factor=2)


KIN = {row.key: row for row in tiles.ROWS if row.projects}


def pictures(family):
    return [picture(seed, family.size) for seed in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("family", [LLAVA, LLAVA_SIGLIP], ids=["cls", "no cls"])
def test_the_projector_gets_the_patches_of_its_levels(family):
    model, processor = shared_model(family), family.processor()
    with vltok.apply(model, vltok.TokenPacker(levels=(0, 1, 3)), processor=processor) as handle:
        inputs = family.inputs(WORDS, pictures(family), processor=processor)
        found = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        patches = [states[level][:, 1:] if family.has_cls else states[level] for level in (0, 1, 3)]
        assert torch.equal(found, handle.added_modules[0](torch.cat(patches, dim=-1)))


@torch.no_grad()
@pytest.mark.parametrize("key", KIN)
def test_the_projector_of_kin_gets_the_patches_of_its_levels_of_every_crop(key):
    """Rows of the tower that the model itself takes, without the first one."""
    family = KIN[key]
    model, processor = shared_model(family), family.processor()
    method, seen, given = vltok.TokenPacker(family.packer_scale, levels=(0, 1, 3)), [], []
    with vltok.apply(model, method, processor=processor) as handle:
        projector = handle.added_modules[0]
        hooks = [
            projector.register_forward_hook(lambda module, args, output: seen.append((args[0], output))),
            model.model.vision_tower.register_forward_pre_hook(
                lambda module, args, options: given.append(args[0] if args else options["pixel_values"]),
                with_kwargs=True,
            ),
        ]
        inputs = family.inputs(WORDS, pictures(family), processor=processor)
        logits = model(**inputs).logits
        for hook in hooks:
            hook.remove()
        (features, output), (pixels,) = *seen, given
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        has_cls = states[0].shape[1] > projector.grid[0] * projector.grid[1]
        expected = torch.cat([states[level][:, int(has_cls) :] for level in (0, 1, 3)], dim=-1)
    assert torch.equal(features, expected)
    assert output.shape[1] == projector.grid[0] * projector.grid[1] // family.packer_scale**2
    assert logits.isfinite().all()


def test_config_and_processor_of_kin_follow_and_come_back():
    for family, field, before, after in (
        (KIN["vipllava-cls"], "patch_size", 14, 28),
        (KIN["llava_next_video-cls"], "patch_size", 14, 28),
        (KIN["internvl-cls"], "image_seq_length", 16, 4),
    ):
        model, processor = shared_model(family), family.processor()
        one = family.inputs(WORDS[:1], pictures(family)[:1], processor=processor)["input_ids"].shape[1]
        with unchanged(model):
            handle = vltok.apply(model, vltok.TokenPacker(family.packer_scale), processor=processor)
            assert getattr(processor, field) == after
            fewer = family.inputs(WORDS[:1], pictures(family)[:1], processor=processor)["input_ids"].shape[1]
            assert fewer < one
            other = pytest.raises(ValueError, match=f"the processor's {field} is {after}, the model's {before}")
            with other:
                vltok.apply(family.model(), vltok.TokenPacker(family.packer_scale), processor=processor)
            handle.remove()
        assert getattr(processor, field) == before
        assert processor.to_dict() == family.processor().to_dict()


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(width=st.integers(20, 200), height=st.integers(20, 200))
def test_llava_next_video_lays_out_fewer_tokens_for_pictures_of_any_shape(width, height):
    family = KIN["llava_next_video-cls"]
    model, processor = shared_model(family), family.processor()
    shown = [picture(0, (width, height))]
    with vltok.apply(model, vltok.TokenPacker(2, init="pool"), processor=processor):
        inputs = family.inputs(["w1 <image> w2"], shown, processor=processor)
        assert model(**inputs).logits.isfinite().all()
    full = (family.inputs(["w1 <image> w2"], shown)["input_ids"] == 4).sum()
    assert (inputs["input_ids"] == 4).sum() < full / 2


def test_videos_that_are_pooled_before_the_projector_are_refused_while_it_is_another():
    family = KIN["llava_next_video-cls"]
    model, processor = shared_model(family), family.processor()
    video = torch.stack([torch.from_numpy(np.array(picture(seed))) for seed in range(2)]).permute(0, 3, 1, 2)
    inputs = family.inputs(["w1 <video> w2"], videos=[video])
    expected = model(**inputs).logits
    with vltok.apply(model, PACKER, processor=processor), pytest.raises(ValueError, match="pools the frames of videos"):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_internvl_condenses_the_frames_of_videos_and_ranks_regions_by_the_mean_over_their_patches():
    family = KIN["internvl-cls"]
    model, processor = shared_model(family), family.processor()
    video = torch.stack([torch.from_numpy(np.array(picture(seed))) for seed in range(3)]).permute(0, 3, 1, 2)
    shown = pictures(family)[:1]
    tower, pixels = shared_model(family, "eager").model.vision_tower, family.inputs(WORDS[:1], shown)["pixel_values"]
    maps = tower(pixels, output_attentions=True).attentions[-1].mean(1)[:, 0, 1:]
    with vltok.apply(model, vltok.TokenPacker(4), processor=processor):
        frames = family.inputs(["w1 <video> w2"], videos=[video], processor=processor)
        assert (frames["input_ids"] == 4).sum() == 3 * 4
        assert model(**frames).logits.isfinite().all()
        (found,) = probe(model, family.inputs(WORDS[:1], shown, processor=processor), "cls")
    expected = nn.functional.avg_pool2d(maps.view(-1, 1, 8, 8), 4).reshape(1, -1)
    torch.testing.assert_close(found.attention, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["vipllava-cls", "internvl-cls"])
def test_a_projector_with_a_norm_is_not_continued(key):
    family = KIN[key]
    model = shared_model(family)
    refused = pytest.raises(UnsupportedModelError, match='is built otherwise; use init="random"')
    with unchanged(model), refused:
        vltok.apply(model, vltok.TokenPacker(family.packer_scale, init="pool"), processor=family.processor())


def test_config_and_processor_follow_and_come_back():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    with unchanged(model):
        handle = vltok.apply(model, PACKER, processor=processor)
        assert model.config.vision_feature_layer == [1, 2]
        assert model.config.image_seq_length == 4
        assert processor.patch_size == 28
        assert (LLAVA.inputs(WORDS[:1], pictures(LLAVA)[:1], processor=processor)["input_ids"] == 4).sum() == 4
        assert model.config.vltok["methods"] == [PACKER.to_dict() | {"levels": (1, 2), "embed_dim": 32, "num_heads": 1}]
        handle.remove()
    assert processor.patch_size == 14
    assert processor.to_dict() == LLAVA.processor().to_dict()


def test_the_report_says_what_was_condensed(capsys):
    model, processor = shared_model(LLAVA), LLAVA.processor()
    with vltok.apply(model, PACKER, processor=processor) as handle:
        assert "no prompt with images" in str(handle.report(file=None))
        model(**LLAVA.inputs(WORDS, pictures(LLAVA), processor=processor))
        report = handle.report()
    assert capsys.readouterr().out == "projector: 16 patches -> 4 visual tokens (images, crops: 3)\n"
    assert report.condensed == vltok.report.Condensed(pictures=3, patches=16, tokens=4)


@pytest.mark.parametrize("method", [vltok.ToDRE(num_keep=2), vltok.FasterVLM(num_keep=2)], ids=["todre", "fastervlm"])
def test_condensed_tokens_can_be_pruned_in_one_call_or_two(method):
    model, processor = shared_model(LLAVA), LLAVA.processor()
    torch.manual_seed(0)
    with vltok.apply(model, [PACKER, method], processor=processor) as handle:
        inputs = LLAVA.inputs(WORDS, pictures(LLAVA), processor=processor)
        together = model(**inputs).logits
        report = handle.report(file=None)
    assert (
        report.condensed.tokens == 4 and report.visual_tokens == [[4], [4, 4]] and report.kept_tokens == [[2], [2, 2]]
    )
    torch.manual_seed(0)
    with vltok.apply(model, PACKER, processor=processor), vltok.apply(model, method):
        assert torch.equal(model(**inputs).logits, together)


def test_attention_over_regions_is_the_mean_over_their_patches():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    shown = pictures(LLAVA)[:1]
    (before,) = probe(model, LLAVA.inputs(WORDS[:1], shown), "cls")
    with vltok.apply(model, PACKER, processor=processor):
        (after,) = probe(model, LLAVA.inputs(WORDS[:1], shown, processor=processor), "cls")
    expected = nn.functional.avg_pool2d(before.attention.view(1, 4, 4), 2).flatten(1)
    torch.testing.assert_close(after.attention, expected)


def test_pruning_that_watches_the_old_projector_is_in_the_way():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    refused = pytest.raises(ValueError, match="replace the projector first")
    with vltok.apply(model, vltok.StrideTokens(num_keep=2)), unchanged(model), refused:
        vltok.apply(model, PACKER, processor=processor)
    with unchanged(model), pytest.raises(ValueError, match="replace the projector first"):
        vltok.apply(model, [vltok.StrideTokens(num_keep=2), PACKER], processor=processor)
    assert processor.patch_size == 14


@torch.no_grad()
def test_a_projector_leaves_before_or_after_the_pruning_behind_it():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    inputs, prune = single(LLAVA, "text around"), vltok.StrideTokens(num_keep=2)
    with vltok.apply(model, prune):
        expected = model(**inputs).logits
    for order in ((0, 1), (1, 0)):
        with unchanged(model):
            handles = [vltok.apply(model, PACKER, processor=processor), vltok.apply(model, prune)]
            handles[order[0]].remove()
            if order[0] == 0:
                assert torch.equal(model(**inputs).logits, expected)
            handles[order[1]].remove()


def larger_next() -> nn.Module:
    """A LLaVA-NeXT whose crops have 4 x 4 patches."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LLAVA_NEXT.build("sdpa").config.to_dict()
    config["vision_config"]["image_size"] = 56
    config["image_grid_pinpoints"] = [[56, 112], [112, 56], [112, 112]]
    return sharpen(LlavaNextForConditionalGeneration(LlavaNextConfig(**config)))


@pytest.fixture(scope="module")
def next_pair():
    processor = LLAVA_NEXT.processor()
    processor.image_processor.size = {"shortest_edge": 56}
    processor.image_processor.crop_size = {"height": 56, "width": 56}
    processor.image_processor.image_grid_pinpoints = [[56, 112], [112, 56], [112, 112]]
    return larger_next(), processor


@torch.no_grad()
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(20, 200), height=st.integers(20, 200))
def test_llava_next_lays_out_fewer_tokens_for_pictures_of_any_shape(next_pair, width, height):
    model, processor = next_pair
    shown = [picture(0, (width, height))]
    with vltok.apply(model, vltok.TokenPacker(2, init="pool"), processor=processor):
        inputs = processor(text=["w1 <image> w2"], images=shown, return_tensors="pt")
        (packed,) = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        assert len(packed) == (inputs["input_ids"] == 4).sum()
        model(**inputs)
    plain = processor(text=["w1 <image> w2"], images=shown, return_tensors="pt")
    (full,) = model.get_image_features(plain["pixel_values"], plain["image_sizes"]).pooler_output
    assert len(packed) < len(full) / 2
    newline = model.model.image_newline
    assert (packed == newline).all(-1).sum() * 2 in ((full == newline).all(-1).sum() + odd for odd in (-2, -1, 0, 1, 2))


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(width=st.integers(20, 200), height=st.integers(20, 200))
def test_llava_onevision_lays_out_fewer_tokens_for_pictures_of_any_shape(width, height):
    model, processor = shared_model(LLAVA_ONEVISION), LLAVA_ONEVISION.processor()
    shown = [picture(0, (width, height))]
    with vltok.apply(model, PACKER, processor=processor):
        inputs = LLAVA_ONEVISION.inputs(["w1 <image> w2"], shown, processor=processor)
        model(**inputs)
    packed, full = (
        (ids == 4).sum() for ids in (inputs["input_ids"], LLAVA_ONEVISION.inputs(["<image>"], shown)["input_ids"])
    )
    assert packed < full / 2


@torch.no_grad()
def test_llava_onevision_condenses_the_frames_of_videos():
    model, processor = shared_model(LLAVA_ONEVISION), LLAVA_ONEVISION.processor()
    video = torch.stack([torch.from_numpy(np.array(picture(seed))) for seed in range(3)]).permute(0, 3, 1, 2)
    with vltok.apply(model, PACKER, processor=processor):
        inputs = processor(text=["w1 <video> w2"], videos=[video], return_tensors="pt")
        assert (inputs["input_ids"] == 5).sum() == 3 * 1 + 1, "2 x 2 tokens pooled to one in each frame, and a newline"
        assert model(**inputs).logits.isfinite().all()


def test_each_refusal_names_the_cause_and_leaves_the_model_alone():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    refusals = [
        (PACKER, None, ValueError, "needs the processor"),
        (PACKER, QWEN2_5_VL.processor(), ValueError, "Qwen2_5_VLProcessor is no processor of this model"),
        (
            PACKER,
            LLAVA_SIGLIP.processor(),
            ValueError,
            "vision_feature_select_strategy is 'full', the model's 'default'",
        ),
        (vltok.TokenPacker(3), processor, ValueError, "doesn't divide the grid of 4 x 4 patches; .* do: 2, 4"),
    ]
    for method, given_processor, error, message in refusals:
        with unchanged(model), pytest.raises(error, match=message):
            vltok.apply(model, method, processor=given_processor)
    wrong = LLAVA.processor()
    wrong.image_token_id = 7
    with unchanged(model), pytest.raises(ValueError, match="image_token_id is 7, the model's 4"):
        vltok.apply(model, PACKER, processor=wrong)


def test_a_processor_that_serves_another_condensed_model_is_refused():
    model, other, processor = shared_model(LLAVA), LLAVA.model(), LLAVA.processor()
    refused = pytest.raises(ValueError, match="patch_size is 28, the model's 14; was it saved, or is it in use")
    with vltok.apply(model, PACKER, processor=processor), unchanged(other), refused:
        vltok.apply(other, PACKER, processor=processor)
    assert processor.patch_size == 14


def test_models_whose_features_are_no_grid_of_patches_are_refused():
    model = LLAVA.model()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModelError, match=r"leaves the \[CLS\] token among the patches"):
        vltok.apply(model, PACKER, processor=LLAVA.processor())
    with torch.device("meta"):
        offloaded = LLAVA.build("sdpa")
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        vltok.apply(offloaded, PACKER, processor=LLAVA.processor())


def test_a_text_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="has no visual tokens that vltok can reach"):
        vltok.apply(shared_model(LLAVA).model.language_model, PACKER, processor=LLAVA.processor())


def test_a_saved_adapter_reads_its_own_levels_on_any_model(tmp_path):
    with vltok.apply(shared_model(LLAVA), PACKER, processor=LLAVA.processor()) as handle:
        vltok.save(handle, tmp_path)
    other = LLAVA.model()
    other.config.vision_feature_layer = -1
    with vltok.load(other, tmp_path, processor=LLAVA.processor()) as handle:
        assert other.config.vision_feature_layer == [1, 2]
        assert handle.methods[0].levels == (1, 2)


def test_from_pretrained_refuses_folders_it_did_not_mark(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        vltok.from_pretrained(tmp_path)
    shared_model(LLAVA).save_pretrained(tmp_path)
    LLAVA.processor().save_pretrained(tmp_path)
    with pytest.raises(vltok.errors.CheckpointError, match="saved without vltok methods"):
        vltok.from_pretrained(tmp_path)


def test_from_pretrained_takes_options_and_names_missing_weights(tmp_path):
    model, processor = LLAVA.model(), LLAVA.processor()
    with vltok.apply(model, PACKER, processor=processor):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    assert vltok.from_pretrained(tmp_path, dtype=torch.bfloat16).added_modules[0].mlp[0].weight.dtype == torch.bfloat16
    own = LLAVA.processor()
    assert vltok.from_pretrained(tmp_path, processor=own).processor is own and own.patch_size == 28
    model.save_pretrained(tmp_path)  # without the new projector
    config = (tmp_path / "config.json").read_text()
    with vltok.apply(model, PACKER, processor=processor):
        model.config.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() != config
    with pytest.raises(vltok.errors.CheckpointError, match=r"missing .*multi_modal_projector\.clip_attn"):
        vltok.from_pretrained(tmp_path)
