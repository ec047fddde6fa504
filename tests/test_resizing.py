"""resize(): how many tokens are left of pictures of any size, with every processor that lets the size decide."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TinyFamily, clip, picture, shared_model

import vltok
from vltok.errors import EditConflictError, UnsupportedInputError, UnsupportedModelError

SIZES = [(200, 150), (100, 100), (60, 37), (50, 150), (33, 41)]
RATIOS = [0.8, 0.5, 0.25, 0.1]
PROMPT = "w1 <image> w2"
FAMILIES = list({family.processor: family for family in reversed([*tiny.ALL, *zoo.ROWS])}.values())


@functools.lru_cache
def marks(family: TinyFamily) -> tuple[int, ...]:
    return tuple(tiny.marks(shared_model(family)).values())


def visual(family: TinyFamily, processor: Any, prompts: list[str], images: Any = (), videos: Any = ()) -> list[int]:
    """Visual tokens of each prompt."""
    ids = family.inputs(prompts, images, processor=processor, videos=videos)["input_ids"]
    return torch.isin(ids, torch.tensor(marks(family))).sum(1).tolist()


def counts(family: TinyFamily, processor: Any) -> list[int]:
    """Visual tokens of an image of each size."""
    return [visual(family, processor, [PROMPT], [picture(0, size)])[0] for size in SIZES]


@functools.lru_cache
def whole(family: TinyFamily) -> list[int]:
    return counts(family, family.processor())


def grids(family: TinyFamily) -> bool:
    """Whether an image has a token for each square of pixels."""
    return hasattr(family.processor().image_processor, "merge_size")


DYNAMIC = [family for family in FAMILIES if family.resizes and family.tokens[0] != family.tokens[1]]
dynamic = pytest.mark.parametrize("family", DYNAMIC, ids=lambda family: family.key)
QWEN, INTERNVL = tiny.QWEN2_5_VL, tiny.INTERNVL


@dynamic
def test_an_image_has_at_most_its_share_of_tokens_and_nearly_that(family: TinyFamily):
    processor = family.processor()
    with vltok.resize(processor, 1e-9):
        fewest = counts(family, processor)
    assert fewest != whole(family)
    before = whole(family)
    for ratio in RATIOS:
        with vltok.resize(processor, ratio):
            kept = counts(family, processor)
        for count, full, least, more in zip(kept, whole(family), fewest, before, strict=True):
            assert least <= count <= max(ratio * full, least)
            assert count <= more
            if grids(family):
                assert count > ratio * full - 2 * math.sqrt(ratio * full) - 1
        before = kept
    assert counts(family, processor) == whole(family)


@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in DYNAMIC], ids=lambda family: family.key)
def test_processors_whose_images_have_a_fixed_number_of_tokens_are_refused_by_name(family: TinyFamily):
    processor = family.processor()
    before = dict(vars(processor.image_processor))
    with pytest.raises(UnsupportedModelError, match=type(processor).__name__):
        vltok.resize(processor, 0.5)
    assert vars(processor.image_processor).keys() == before.keys()


@dynamic
def test_each_image_of_a_batch_is_as_it_is_alone(family: TinyFamily):
    prompts, images = ["w1 <image> w2 <image>", PROMPT], [picture(n, size) for n, size in enumerate(SIZES[1:4])]
    processor = family.processor()
    with vltok.resize(processor, 0.4):
        together = family.inputs(prompts, images, processor=processor)
        alone = [family.inputs(prompts[:1], images[:2], processor=processor)]
        alone.append(family.inputs(prompts[1:], images[2:], processor=processor))
    for row, own in enumerate(alone):
        assert torch.equal(together["input_ids"][row][together["attention_mask"][row].bool()], own["input_ids"][0])


@dynamic
def test_the_model_answers_on_what_it_makes(family: TinyFamily):
    processor, model = family.processor(), shared_model(family)
    with vltok.resize(processor, 0.4):
        inputs = family.inputs([PROMPT], [picture(0, family.size)], processor=processor)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        with vltok.apply(model, vltok.StrideTokens(keep_ratio=0.5)) as handle:
            assert model(**inputs).logits.isfinite().all()
            kept = sum(map(sum, handle.report(file=None).kept_tokens))
    full = int(torch.isin(inputs["input_ids"], torch.tensor(marks(family))).sum())
    assert kept <= max(1, math.ceil(full / 2)) or full == kept


@dynamic
def test_the_vision_tower_gets_fewer_pixels(family: TinyFamily):
    def pixels(processor: Any) -> int:
        inputs = family.inputs([PROMPT], [picture(0, (200, 150))], processor=processor)
        return sum(value.numel() for name, value in inputs.items() if name.startswith("pixel_values"))

    processor = family.processor()
    full = pixels(processor)
    with vltok.resize(processor, 0.5):
        assert pixels(processor) <= full
        if grids(family):
            assert pixels(processor) <= full / 2


@pytest.mark.parametrize("family", [each for each in DYNAMIC if each.video], ids=lambda family: family.key)
def test_videos_are_shrunk_or_refused_where_size_changes_nothing(family: TinyFamily):
    clips = [clip(0, size, family.frames) for size in ((96, 64), (64, 64), (48, 32))]
    processor, prompts = family.processor(), ["w1 <video> w2"]

    def tokens() -> list[int]:
        return [visual(family, processor, prompts, videos=[each])[0] for each in clips]

    full = before = tokens()
    for ratio in RATIOS:
        with vltok.resize(processor, ratio):
            try:
                kept = tokens()
            except UnsupportedInputError as error:
                assert "give fewer frames" in str(error)
                assert full[0] == full[2] and not hasattr(processor.video_processor, "merge_size")
                assert visual(family, processor, [PROMPT], [picture(0)])[0] > 0
                continue
        assert all(count <= max(ratio * every, family.frames) for count, every in zip(kept, full, strict=True))
        assert all(count <= more for count, more in zip(kept, before, strict=True))
        before = kept
    assert tokens() == full


# What pictures may be


@pytest.mark.parametrize("family", [QWEN, INTERNVL, *zoo.gemma.ROWS[:1]], ids=lambda family: family.key)
def test_pictures_may_be_of_any_kind(family: TinyFamily):
    image = picture(3, (120, 90))
    array = np.asarray(image)
    kinds = [array, array.transpose(2, 0, 1).copy(), torch.from_numpy(array.transpose(2, 0, 1).copy())]
    processor = family.processor()
    with vltok.resize(processor, 0.5):
        expected = family.inputs([PROMPT], [image], processor=processor)
        for kind in kinds:
            inputs = family.inputs([PROMPT], [kind], processor=processor)
            assert all(torch.equal(inputs[name], value) for name, value in expected.items())


def test_frames_may_be_a_list_of_pictures():
    processor, frames = QWEN.processor(), clip(0, (64, 48))
    with vltok.resize(processor, 0.5):
        expected = QWEN.inputs(["<video>"], videos=[frames], processor=processor)
        as_list = QWEN.inputs(["<video>"], videos=[[frame.numpy() for frame in frames]], processor=processor)
        first = QWEN.inputs(["<video>"], videos=[frames.permute(0, 3, 1, 2)], processor=processor)
    assert torch.equal(expected["pixel_values_videos"], as_list["pixel_values_videos"])
    assert torch.equal(expected["pixel_values_videos"], first["pixel_values_videos"])


def test_processors_without_torchvision_shrink_as_well():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = QWEN.processor()
    fast = processor.image_processor
    processor.image_processor = Qwen2VLImageProcessorPil(size=dict(fast.size), merge_size=2, **tiny.QWEN_PATCHES)
    with vltok.resize(processor, 0.5), vltok.resize(QWEN.processor(), 0.5):
        slow = counts(QWEN, processor)
    processor = QWEN.processor()
    with vltok.resize(processor, 0.5):
        assert counts(QWEN, processor) == slow


def test_chat_templates_and_pipelines_go_through_it():
    from transformers import pipeline

    processor, model = QWEN.processor(), QWEN.model()
    template = "{% for m in messages %}{% for c in m.content %}{{ c.text if c.type == 'text' else image }} {% endfor %}"
    processor.chat_template = template.replace("image }}", repr(QWEN.image) + " }}") + "{% endfor %}"
    content = [{"type": "image", "image": picture(0, (200, 150))}, {"type": "text", "text": "w1"}]
    chat = [{"role": "user", "content": content}]
    ids = []
    model.register_forward_pre_hook(lambda _, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True)

    def shown() -> tuple[int, int]:
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        ids.clear()
        talk = pipeline("image-text-to-text", model=model, processor=processor)
        talk(images=[picture(0, (200, 150))], text=f"{QWEN.image} w1", max_new_tokens=1)
        return int((inputs["input_ids"] == 4).sum()), int((ids[0] == 4).sum())

    assert shown() == (54, 54)
    with vltok.resize(processor, 0.5):
        assert shown() == (24, 24)


# What it makes of a picture


@settings(deadline=None, max_examples=20)
@given(height=st.integers(9, 300), width=st.integers(9, 300), ratio=st.floats(0.02, 0.98))
def test_no_scale_of_the_picture_fits_better(height: int, width: int, ratio: float):
    """By trying a thousand scales; a visual token stands for 8 x 8 pixels."""
    part, image = QWEN.processor().image_processor, torch.zeros(3, height, width, dtype=torch.uint8)

    def tokens() -> int:
        return math.prod(part([image], return_tensors="pt")["image_grid_thw"][0].tolist()) // 4

    full = tokens()
    processor = QWEN.processor()
    processor.image_processor = part
    with vltok.resize(processor, ratio):
        kept = tokens()
    tried = [math.prod(max(1, round(s / 500 * side / 8)) for side in (height, width)) for s in range(1, 1000)]
    fitting = [count for count in tried if count <= ratio * full]
    assert kept <= max(ratio * full, min(tried))
    assert kept >= max(fitting, default=1)


def test_pixels_are_those_of_a_bicubic_picture_and_pruning_comes_on_top():
    family, processor = QWEN, QWEN.processor()
    image = picture(5, (120, 88))
    with vltok.resize(processor, 0.4):
        inputs = family.inputs([PROMPT], [image], processor=processor)
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(pixels, (rows * 4, columns * 4), mode="bicubic", antialias=True)
    small = small.clamp(0, 255).round().to(torch.uint8)[0]
    expected = family.inputs([PROMPT], [small], processor=processor)
    assert all(torch.equal(inputs[name], value) for name, value in expected.items())

    model = shared_model(family)
    with vltok.apply(model, vltok.DivPrune(keep_ratio=0.5)) as handle, torch.no_grad():
        pruned = model(**inputs).logits
        kept = handle.report(file=None).kept_tokens[0][0]
        assert torch.equal(model(**expected).logits, pruned)
    assert kept == round(0.5 * rows * columns / 4)


def test_all_of_it_changes_nothing():
    processor = QWEN.processor()
    plain = QWEN.inputs([PROMPT], [picture(0)], processor=processor)
    with vltok.resize(processor, 1):
        inputs = QWEN.inputs([PROMPT], [picture(0)], processor=processor)
    assert all(torch.equal(inputs[name], value) for name, value in plain.items())


def test_large_images_of_tiles_have_whole_tiles_in_a_layout_near_their_shape():
    from transformers import GotOcr2ImageProcessor

    processor = INTERNVL.processor()
    processor.image_processor = GotOcr2ImageProcessor(size={"height": 56, "width": 56}, max_patches=12)

    def tiles(size: tuple[int, int]) -> int:
        return visual(INTERNVL, processor, [PROMPT], [picture(0, size)])[0] // 16

    assert [tiles(size) for size in ((400, 300), (480, 240), (100, 600))] == [13, 9, 7]
    with vltok.resize(processor, 0.6):
        assert [tiles(size) for size in ((400, 300), (480, 240), (100, 600))] == [7, 3, 4]


@pytest.mark.parametrize(
    ("family", "full", "kept"),
    [
        (zoo.gemma.SMOLVLM, [45, 45, 45, 27, 45], [9, 9, 9, 9, 9]),  # whole tiles
        (zoo.gemma.GEMMA4_ROW, [63, 64, 60, 56, 63], [15, 16, 15, 14, 15]),
    ],
    ids=["tiles", "tokens"],
)
def test_processors_that_make_every_image_as_large_as_allowed_make_smaller_ones(family: TinyFamily, full, kept):
    processor = family.processor()
    assert whole(family) == full
    with vltok.resize(processor, 0.25):
        assert counts(family, processor) == kept


# Taking it off


@pytest.mark.parametrize("family", [QWEN, INTERNVL, *zoo.gemma.ROWS[:1]], ids=lambda family: family.key)
def test_removed_it_leaves_no_trace_and_meanwhile_nothing_is_saved(family: TinyFamily, tmp_path: Path):
    def saved(name: str) -> dict[str, bytes]:
        processor.save_pretrained(tmp_path / name)
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    processor = family.processor()
    plain = family.inputs([PROMPT], [picture(0)], processor=processor)
    shown = repr(processor)
    parts = [processor.image_processor, *([processor.video_processor] if family.video else [])]
    kinds, before, files = [type(part) for part in parts], [dict(vars(part)) for part in parts], saved("before")
    handle = vltok.resize(processor, 0.5)
    assert handle.is_attached and "attached" in repr(handle) and handle.keep_ratio == 0.5
    assert saved("meanwhile") == files and repr(processor) == shown
    handle.remove()
    handle.remove()
    assert not handle.is_attached and "removed" in repr(handle)
    assert [type(part) for part in parts] == kinds and [vars(part) for part in parts] == before
    assert saved("after") == files
    inputs = family.inputs([PROMPT], [picture(0)], processor=processor)
    assert all(torch.equal(inputs[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["deep", "pickle"]
)
def test_copies_go_on_resizing_by_themselves(copied):
    processor = QWEN.processor()
    with vltok.resize(processor, 0.5):
        twin = copied(processor)
        small = counts(QWEN, processor)
        assert counts(QWEN, twin) == small
    assert counts(QWEN, processor) == whole(QWEN)
    assert counts(QWEN, twin) == small
    assert type(twin.image_processor) is type(processor.image_processor)


def test_an_error_in_the_block_takes_it_off():
    processor = QWEN.processor()
    with pytest.raises(RuntimeError, match="stop"), vltok.resize(processor, 0.5):
        raise RuntimeError("stop")
    assert counts(QWEN, processor) == whole(QWEN)


def test_several_threads_may_call_it():
    processor = QWEN.processor()
    results: dict[int, list[int]] = {}
    with vltok.resize(processor, 0.5):
        expected = counts(QWEN, processor)
        threads = [threading.Thread(target=lambda n=n: results.update({n: counts(QWEN, processor)})) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert list(results.values()) == [expected] * 4


def test_bad_arguments_are_refused():
    processor = QWEN.processor()
    for ratio, error in ((0, ValueError), (1.5, ValueError), ("half", TypeError), (None, TypeError), (True, TypeError)):
        with pytest.raises(error, match="keep_ratio"):
            vltok.resize(processor, ratio)
    for other in (processor.image_processor, processor.tokenizer, shared_model(QWEN), object()):
        with pytest.raises(TypeError, match="takes the processor of a vision-language model"):
            vltok.resize(other, 0.5)
    with vltok.resize(processor, 0.5), pytest.raises(EditConflictError, match="is resizing already; remove that"):
        vltok.resize(processor, 0.5)
