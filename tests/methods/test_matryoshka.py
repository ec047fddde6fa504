"""One projector for several scale factors: each gives what a projector of that scale factor alone gives."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import INTERNVL, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, LLAVA_SIGLIP, picture, shared_model
from torch import nn
from towers import draw
from unchanged import unchanged
from zoo import tiles

import vltok
from vltok.errors import UnsupportedInputError
from vltok.methods.condensing.average_pool import AveragePoolProjector
from vltok.nn import TokenPackerProjector
from vltok.processing import TokenPackerHDProcessor

KIN = {row.key: row for row in tiles.ROWS}
ROWS = [LLAVA, LLAVA_SIGLIP, LLAVA_NEXT, LLAVA_ONEVISION, INTERNVL, KIN["vipllava-cls"], KIN["llava_next_video-cls"]]
WORDS = ["w1 <image> w2", "<image> w3 w4 <image>"]
MULTI = [vltok.TokenPacker, vltok.AveragePool]


def inputs(family, processor):
    return family.inputs(WORDS, [picture(seed, family.size) for seed in range(3)], processor=processor)


@torch.no_grad()
def answers(model: nn.Module, family, processor) -> torch.Tensor:
    return model(**inputs(family, processor)).logits


def alone(family, several: vltok.Handle, method: vltok.Method) -> torch.Tensor:
    """What a model answers on which a method of one scale factor has the weights of a handle."""
    model, processor = family.model(), family.processor()
    with vltok.apply(model, method, processor=processor) as handle:
        handle.added_modules[0].load_state_dict(several.added_modules[0].state_dict())
        return answers(model, family, processor)


# The modules


@pytest.mark.parametrize("scale", [2, 3, 4, 1])
def test_a_call_at_a_scale_is_that_of_a_projector_of_this_scale(scale):
    torch.manual_seed(0)
    several, one = (TokenPackerProjector(12, 8, 12, given, 2, 16, 4) for given in ((2, 3, 4, 1), scale))
    one.load_state_dict(several.state_dict())
    x = torch.randn(3, 144, 16).requires_grad_()
    found, expected = several(x, scale_factor=scale), one(x)
    assert torch.equal(found, expected) and found.shape == (3, 144 // scale**2, 12)
    gradients = [
        torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        for out, module in ((found, several), (expected, one))
    ]
    assert all(map(torch.equal, *gradients))


@torch.no_grad()
@pytest.mark.parametrize("kind", [TokenPackerProjector, AveragePoolProjector])
def test_the_first_scale_counts_and_others_are_refused(kind):
    projector = kind(4, 8, 12, 16, (2, 4)) if kind is AveragePoolProjector else kind(4, 8, 16, (2, 4), 1, 16, 2)
    x = torch.randn(2, 16, 8)
    assert torch.equal(projector(x), projector(x, scale_factor=2)) and projector.num_tokens == 4
    assert projector(x, scale_factor=4).shape == (2, 1, 16)
    with pytest.raises(ValueError, match=r"scale_factor must be one of \(2, 4\), got 1"):
        projector(x, scale_factor=1)


def test_a_backward_pass_is_at_the_scale_of_its_call():
    """Another call at another scale, and leaving the block, come before it."""
    model, processor = LLAVA.model(), LLAVA.processor()
    handle = draw(vltok.apply(model, vltok.TokenPacker((2, 4)), processor=processor))
    weights = list(handle.added_modules[0].parameters())
    with handle.using(scale_factor=4):
        loss = model(**inputs(LLAVA, processor)).logits.square().mean()
        expected = torch.autograd.grad(loss, weights, retain_graph=True)
    model(**inputs(LLAVA, processor))
    assert all(map(torch.equal, torch.autograd.grad(loss, weights), expected))


# The method


@pytest.mark.parametrize("family", ROWS, ids=lambda row: row.key)
def test_a_block_gives_what_the_scale_alone_gives(family):
    scales = (family.packer_scale, 1)
    model, processor = shared_model(family), family.processor()
    with vltok.apply(model, vltok.TokenPacker(1), processor=processor):
        answers(model, family, processor)  # transformers puts hooks of its own on with the first call for hidden states
    with unchanged(model):
        handle = draw(vltok.apply(model, vltok.TokenPacker(scales), processor=processor))
        usual = answers(model, family, processor)
        assert torch.equal(usual, alone(family, handle, vltok.TokenPacker(scales[0])))
        with handle.using(scale_factor=1):
            found = answers(model, family, processor)
            condensed = handle.report(file=None).condensed
            assert condensed.tokens == condensed.patches
            with handle.using(scale_factor=scales[0]):
                assert torch.equal(answers(model, family, processor), usual)
            assert torch.equal(answers(model, family, processor), found)
        assert torch.equal(answers(model, family, processor), usual)
        assert torch.equal(found, alone(family, handle, vltok.TokenPacker(1)))
        assert found.shape[1] > usual.shape[1]
        handle.remove()
    assert vars(processor).keys() == vars(family.processor()).keys()
    assert processor.to_dict() == family.processor().to_dict()


def test_average_pooling_needs_no_training_to_serve_several_scales():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    found = {}
    with vltok.apply(model, vltok.AveragePool((2, 4, 1)), processor=processor) as handle:
        for scale in (2, 4, 1):
            with handle.using(scale_factor=scale):
                found[scale] = answers(model, LLAVA, processor)
    for scale in (2, 4, 1):
        with vltok.apply(model, vltok.AveragePool(scale), processor=processor):
            assert torch.equal(answers(model, LLAVA, processor), found[scale])
    torch.testing.assert_close(found[1], answers(model, LLAVA, processor))


@torch.no_grad()
def test_videos_of_pooled_frames_follow_the_scale():
    model, processor = shared_model(LLAVA_ONEVISION), LLAVA_ONEVISION.processor()
    video = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    with vltok.apply(model, vltok.TokenPacker((2, 1)), processor=processor) as handle:
        for scale, tokens in ((2, 3 * 1 + 1), (1, 3 * 4 + 1)):
            with handle.using(scale_factor=scale):
                given = processor(text=["w1 <video> w2"], videos=[video], return_tensors="pt")
                assert (given["input_ids"] == 5).sum() == tokens
                assert model(**given).logits.isfinite().all()


def test_condensed_tokens_are_pruned_at_every_scale():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    methods = [vltok.TokenPacker((2, 1)), vltok.StrideTokens(keep_ratio=0.5)]
    with vltok.apply(model, methods, processor=processor) as handle:
        for scale, kept in ((2, 2), (1, 8)):
            with handle.using(scale_factor=scale):
                answers(model, LLAVA, processor)
                assert handle.report(file=None).kept_tokens == [[kept], [kept, kept]]
            with handle.using(scale_factor=scale, keep_ratio=0.25):
                answers(model, LLAVA, processor)
                assert handle.report(file=None).kept_tokens == [[kept // 2], [kept // 2] * 2]


@pytest.mark.parametrize("method", MULTI)
def test_threads_run_at_different_scales_at_once(method):
    model, processor = shared_model(LLAVA), LLAVA.processor()
    scales, rounds = (2, 4, 1), 6
    with vltok.apply(model, method(scales), processor=processor) as handle:
        expected = {}
        for scale in scales:
            with handle.using(scale_factor=scale):
                expected[scale] = answers(model, LLAVA, processor)
        barrier, tokenizer = threading.Barrier(len(scales), timeout=60), threading.Lock()

        def run(scale: int) -> list[bool]:
            same = []
            for _ in range(rounds):
                with handle.using(scale_factor=scale):
                    with tokenizer:  # one thread at a time may use one
                        given = inputs(LLAVA, processor)
                    barrier.wait()
                    with torch.no_grad():
                        same.append(torch.equal(model(**given).logits, expected[scale]))
            return same

        with ThreadPoolExecutor(len(scales)) as pool:
            assert list(pool.map(run, scales)) == [[True] * rounds] * len(scales)


def test_generate_takes_the_scale_of_the_block():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    with vltok.apply(model, vltok.TokenPacker((2, 4)), processor=processor) as handle, handle.using(scale_factor=4):
        given = inputs(LLAVA, processor)
        words = model.generate(**given, max_new_tokens=3, do_sample=False)
        assert words.shape[1] == given["input_ids"].shape[1] + 3
        assert handle.report(file=None).condensed.tokens == 1


@pytest.mark.parametrize("method", MULTI)
def test_placeholders_of_another_scale_are_refused(method):
    model, processor = shared_model(LLAVA), LLAVA.processor()
    with vltok.apply(model, method((2, 4)), processor=processor) as handle:
        given = inputs(LLAVA, processor)
        with handle.using(scale_factor=4):
            fewer = inputs(LLAVA, processor)
            with pytest.raises(UnsupportedInputError, match=r"scale_factor=4 of \(2, 4\): let the processor and"):
                model(**given)
        with pytest.raises(UnsupportedInputError, match=r"scale_factor=2 of \(2, 4\)"):
            model(**fewer)
        with handle.using(scale_factor=4), ThreadPoolExecutor(1) as pool:  # a thread of its own is outside of the block
            with pytest.raises(UnsupportedInputError, match="in the same thread"):
                pool.submit(model, **fewer).result()
            assert model(**fewer).logits.isfinite().all()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3, ValueError, r"scale_factor must be one of \[2, 4\] in a block, got 3"),
        ((2, 4), TypeError, "scale_factor must be an integer"),
        (True, TypeError, "scale_factor must be an integer, got True"),
        (None, TypeError, "scale_factor must be an integer, got None"),
    ],
)
def test_a_block_takes_one_of_the_scales(value, error, message):
    with vltok.apply(shared_model(LLAVA), vltok.TokenPacker((4, 2)), processor=LLAVA.processor()) as handle:
        with pytest.raises(error, match=message):
            handle.using(scale_factor=value)
        with pytest.raises(ValueError, match="it can change scale_factor; for other settings"):
            handle.using(init="pool")


def test_one_scale_can_not_be_changed_for_a_block():
    for method in (vltok.TokenPacker(2), vltok.TokenPacker((2,)), vltok.AveragePool(2), vltok.PixelShuffle(2)):
        refused = pytest.raises(ValueError, match="it can change nothing")
        with vltok.apply(shared_model(LLAVA), method, processor=LLAVA.processor()) as handle, refused:
            handle.using(scale_factor=2)


@pytest.mark.parametrize("method", MULTI)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((), ValueError, r"a number, or several that differ, got \(\)"),
        ((2, 2), ValueError, r"several that differ, got \(2, 2\)"),
        ((2, 0), ValueError, "scale_factor must be at least 1, got 0"),
        ((2, 2.0), TypeError, "scale_factor must be an integer"),
        ("24", TypeError, "scale_factor must be an integer"),
    ],
)
def test_scales_out_of_range_are_refused(method, value, error, message):
    with pytest.raises(error, match=message):
        method(value)


def test_every_scale_must_divide_the_grid():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    with unchanged(model), pytest.raises(ValueError, match=r"scale_factor=3 doesn't divide the grid .* do: 2, 4"):
        vltok.apply(model, vltok.TokenPacker((2, 3)), processor=processor)
    assert processor.to_dict() == LLAVA.processor().to_dict()


# Copies and files


@pytest.mark.parametrize("method", MULTI)
def test_saved_scales_come_back(method, tmp_path):
    model, processor = shared_model(LLAVA), LLAVA.processor()
    with vltok.apply(model, method((4, 2)), processor=processor) as handle:
        draw(handle)
        with handle.using(scale_factor=2):
            expected = answers(model, LLAVA, processor)
            vltok.save(handle, tmp_path)  # a block leaves no trace in what is saved
            model.save_pretrained(tmp_path / "whole")
            processor.save_pretrained(tmp_path / "whole")
        settings = handle.methods
    with vltok.load(model, tmp_path, processor=processor) as handle:
        assert handle.methods == settings and handle.methods[0].scale_factor == (4, 2)
        with handle.using(scale_factor=2):
            assert torch.equal(answers(model, LLAVA, processor), expected)
    loaded = vltok.from_pretrained(tmp_path / "whole")
    assert loaded.methods == settings and loaded.processor.patch_size == 14 * 4
    with loaded.using(scale_factor=2):
        assert torch.equal(answers(loaded.model, LLAVA, loaded.processor), expected)
    loaded.remove()
    assert loaded.processor.to_dict() == LLAVA.processor().to_dict()


def test_the_text_form_takes_several():
    assert vltok.Method.from_text("tokenpacker,scale_factor=(2,3,4),init=pool") == vltok.TokenPacker(
        (2, 3, 4), init="pool"
    )
    assert vltok.TokenPacker([2, 4]) == vltok.TokenPacker((2, 4))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_follows_its_own_handle(how):
    model, processor = LLAVA.model(), LLAVA.processor()
    handle = vltok.apply(model, vltok.TokenPacker((2, 4)), processor=processor)
    twin = how(handle)
    few, many = 1 * 3, 4 * 3
    with handle.using(scale_factor=4):
        assert (inputs(LLAVA, processor)["input_ids"] == 4).sum() == few
        assert (inputs(LLAVA, twin.processor)["input_ids"] == 4).sum() == many
        answers(twin.model, LLAVA, twin.processor)
    with twin.using(scale_factor=4):
        assert (inputs(LLAVA, processor)["input_ids"] == 4).sum() == many
        assert (inputs(LLAVA, twin.processor)["input_ids"] == 4).sum() == few
        found = answers(twin.model, LLAVA, twin.processor)
    with handle.using(scale_factor=4):
        assert torch.equal(answers(model, LLAVA, processor), found)


def test_the_copy_of_the_projector_that_an_adapter_trains_follows_the_block():
    host, processor = LLAVA.model(), LLAVA.processor()
    handle = vltok.apply(host, vltok.TokenPacker((2, 4)), processor=processor)
    with handle.using(scale_factor=4):
        expected = answers(host, LLAVA, processor)
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    adapted = get_peft_model(host, config).eval()
    with handle.using(scale_factor=4):
        assert torch.equal(answers(adapted, LLAVA, processor), expected)


def test_what_a_processor_says_of_itself_is_the_first_scale():
    model, processor = shared_model(LLAVA), LLAVA.processor()
    with vltok.apply(model, vltok.TokenPacker((2, 4)), processor=processor) as handle:
        with vltok.apply(LLAVA.model(), vltok.TokenPacker(2), processor=LLAVA.processor()) as one:
            assert processor.to_dict() == one.processor.to_dict()
        processor.tokenizer.__deepcopy__ = lambda memo: pytest.fail("a tokenizer is too large to be copied for this")
        with handle.using(scale_factor=4):
            assert processor.to_dict()["patch_size"] == 28
            sizes = processor._get_num_multimodal_tokens(image_sizes=[(56, 56)])
            assert sizes.num_image_tokens == [1]
        assert processor._get_num_multimodal_tokens(image_sizes=[(56, 56)]).num_image_tokens == [4]


def test_tiles_of_large_pictures_follow_the_scale():
    model, base = shared_model(LLAVA), LLAVA.processor()
    base.tokenizer.add_tokens([",", "\n"])
    with vltok.apply(model, vltok.TokenPacker((2, 4)), processor=base) as handle:
        large = TokenPackerHDProcessor(base, max_tiles=9)
        for scale, tokens in ((2, 4), (4, 1)):
            with handle.using(scale_factor=scale):
                given = large(picture(0, (150, 60)), "w1 <image>", return_tensors="pt")
                assert large.tokens_per_tile == tokens
                assert (given["input_ids"] == large.image_token_id).sum() == tokens * len(given["pixel_values"])
                assert model(**given).logits.isfinite().all()
    with unchanged(model), pytest.raises(ValueError, match="TokenPackerHDProcessor leaves it to another processor"):
        vltok.apply(model, vltok.TokenPacker((2, 4)), processor=large)
