"""The processor of TokenPacker-HD around the real LlavaProcessor."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import tiny
import torch
import transformers
from tiny import LLAVA, LLAVA_SIGLIP, picture
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessor, CLIPImageProcessorPil, LlamaTokenizer, LlavaProcessor, ProcessorMixin

import vltok
from vltok.errors import CheckpointError
from vltok.methods.condensing.token_packer.tiles import choose_grid
from vltok.processing import TokenPackerHDProcessor

COMMA, NEWLINE, IMAGE = 45, 46, 4
WIDE, TALL, SMALL = (150, 50), (50, 105), (50, 50)  # (width, height)
GRIDS = {WIDE: (1, 3), TALL: (2, 1), SMALL: (1, 1)}


def plain_processor(family=LLAVA, specials: bool = False):
    """The family's processor, whose tokenizer knows the separators; `specials` frames prompts with <s> and </s>."""
    processor = family.processor()
    processor.tokenizer.add_tokens([",", "\n"])
    if specials:
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return processor


def hd_processor(**options):
    return TokenPackerHDProcessor(plain_processor(), **options)


def ids_of(grid, tokens: int) -> list[int]:
    """The ids of a picture, written out."""
    ids = []
    for _ in range(grid[0]):
        for column in range(grid[1]):
            ids += [COMMA] if column else []
            ids += [IMAGE] * tokens
        ids += [NEWLINE]
    return ids + ([IMAGE] * tokens + [NEWLINE] if grid != (1, 1) else [])


def words(text: str) -> list[int]:
    return [int(word[1:]) + 5 for word in text.split()]


# What comes out


def test_each_placeholder_becomes_its_picture():
    assert {size: choose_grid(size[1], size[0], 9, 56) for size in GRIDS} == GRIDS
    processor = hd_processor()
    text, sizes = ["w1 <image> w2 <image> w3", "w4 w5", "<image> w6"], [WIDE, SMALL, TALL]
    inputs = processor([picture(seed, size) for seed, size in enumerate(sizes)], text)
    wide, small, tall = (ids_of(GRIDS[size], 16) for size in sizes)
    expected = [[*words("w1"), *wide, *words("w2"), *small, *words("w3")], words("w4 w5"), [*tall, *words("w6")]]
    assert inputs["input_ids"] == expected
    assert inputs["attention_mask"] == [[1] * len(ids) for ids in expected]
    assert inputs["pixel_values"].shape == (4 + 1 + 3, 3, 56, 56)


def test_a_picture_of_one_tile_is_what_the_wrapped_processor_makes_of_it_and_a_newline():
    plain = plain_processor()
    given = {"images": [picture(0)], "text": ["w1 <image> w2"], "return_tensors": "pt"}
    old, new = plain(**given), TokenPackerHDProcessor(plain)(**given)
    torch.testing.assert_close(new["pixel_values"], old["pixel_values"], rtol=0, atol=1e-6)
    assert new["input_ids"].tolist() == [[*old["input_ids"][0, :-1], NEWLINE, old["input_ids"][0, -1]]]


@pytest.mark.parametrize("family", [LLAVA, LLAVA_SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("scale_factor", [1, 2, 4])
def test_a_tile_has_as_many_tokens_as_the_wrapped_processor_writes(family, scale_factor):
    plain = plain_processor(family)
    plain.patch_size *= scale_factor
    count = plain([picture(0)], "<image>")["input_ids"][0].count(IMAGE)
    assert TokenPackerHDProcessor(plain).tokens_per_tile == count == 16 // scale_factor**2
    plain.image_processor = CLIPImageProcessor(size={"height": 56, "width": 56}, do_center_crop=False)
    assert TokenPackerHDProcessor(plain).tokens_per_tile == count


# What goes in


@pytest.mark.parametrize("backend", ["CLIPImageProcessor", "CLIPImageProcessorPil", "LlavaImageProcessor"])
@pytest.mark.parametrize("kind", ["pil", "array", "tensor", "gray", "transparent"])
def test_all_kinds_of_pictures_come_out_alike(kind, backend):
    processor = hd_processor()
    image = picture(0, WIDE).convert("L" if kind == "gray" else "RGB").convert("RGB")
    expected = processor(image, "<image>")["pixel_values"]
    other = {
        "pil": image,
        "array": np.array(image),
        "tensor": torch.tensor(np.array(image)).permute(2, 0, 1),
        "gray": image.convert("L"),
        "transparent": image.convert("RGBA"),
    }[kind]
    processor.image_processor = getattr(transformers, backend)(crop_size={"height": 56, "width": 56}, do_pad=True)
    torch.testing.assert_close(processor(other, "<image>")["pixel_values"], expected, rtol=0, atol=2e-6)


def test_pictures_come_in_all_the_usual_lists_and_by_path(tmp_path):
    processor = hd_processor()
    processor.image_processor = CLIPImageProcessorPil(crop_size={"height": 56, "width": 56})
    picture(0, WIDE).save(tmp_path / "picture.png")
    first, second = (np.array(picture(seed, WIDE)) for seed in (0, 1))
    text = ["<image> w1", "<image>"]
    expected = processor([first, second], text)
    for images in ([[first], [second]], ([first], (second,)), np.stack([first, second]), [np.stack([first, second])]):
        inputs = processor(images, text)
        assert inputs["input_ids"] == expected["input_ids"]
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert processor(images=[[], [first]], text=["w1", "<image>"])["input_ids"][0] == words("w1")
    for image in (first, str(tmp_path / "picture.png")):
        assert torch.equal(processor(image)["pixel_values"], expected["pixel_values"][:4])


@pytest.mark.parametrize("images", [None, []])
def test_text_alone_is_what_the_wrapped_processor_makes_of_it(images):
    given = {"text": ["w1 w2", "w3 w4 w5"], "padding": True, "return_tensors": "pt"}
    old, new = plain_processor()(**given), hd_processor()(images, **given)
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in old)


ONE = picture(0)


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([ONE, ONE], ["<image>"], "2 images came for 1 placeholders '<image>'"),
        (ONE, ["<image> <image>", "w1"], "1 images came for 2 placeholders"),
        (None, "w1 <image>", "0 images came for 1 placeholders"),
        (ONE, "w1", "1 images came for 0 placeholders"),
        ([[ONE, ONE], [ONE]], ["<image>", "<image> <image>"], r"hold \[2, 1\], but the prompts have \[1, 2\]"),
        ([[ONE, ONE]], ["<image>", "<image>"], r"lists of images hold \[2\], but the prompts have \[1, 1\]"),
        (None, [["w1"]], "text must be a string or a list of strings"),
        (None, [], "text must be a string or a list of strings"),
        (None, None, "pass images, text or both"),
    ],
)
def test_pictures_that_do_not_fit_the_prompts_are_refused(images, text, message):
    with pytest.raises(ValueError, match=message):
        hd_processor()(images, text)


REFUSED = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}, "images_kwargs": {"do_pad": True}}
REFUSED |= {"do_resize": True, "do_center_crop": True, "data_format": "channels_last", "text_pair": "w1"}
REFUSED |= {"return_overflowing_tokens": True, "videos": [0], "audio": [0.0]}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_can_not_hold_are_refused(name):
    with pytest.raises(ValueError, match=r"doesn't support|not supported"):
        hd_processor()(picture(0), "<image>", **{name: REFUSED[name]})


def test_options_for_pictures_and_text_reach_their_parts():
    processor = hd_processor()
    image = picture(0, WIDE)
    assert processor(image, do_normalize=False, rescale_factor=1.0)["pixel_values"].max() > 200
    inputs = processor(image, "<image>", return_tensors="np", padding=True, return_attention_mask=False)
    kinds = {name: type(value) for name, value in inputs.items()}
    assert kinds == {"input_ids": np.ndarray, "pixel_values": np.ndarray}


# Padding, truncation and what goes along


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", ["call", "tokenizer"])
def test_prompts_are_padded_after_their_pictures_came_in(side, given):
    processor = hd_processor()
    processor.tokenizer.padding_side = side if given == "tokenizer" else "right"
    options = {"padding_side": side} if given == "call" else {}
    pictures, text = [picture(0, WIDE), picture(1, SMALL)], ["w1 <image>", "<image> w2 w3"]
    flags = {"return_mm_token_type_ids": True, "return_offsets_mapping": True, "return_special_tokens_mask": True}
    ragged = processor(pictures, text, **flags)
    padded = processor(pictures, text, **flags, **options, padding=True, return_tensors="pt")
    wide, small = (ids_of(GRIDS[size], 16) for size in (WIDE, SMALL))
    width = 1 + len(wide)
    fillers = {"input_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0)}
    for name in ("input_ids", "attention_mask", "special_tokens_mask", "mm_token_type_ids", "offset_mapping"):
        for row, result in zip(ragged[name], padded[name], strict=True):
            pad = [fillers.get(name, 0)] * (width - len(row))
            assert torch.equal(result, torch.tensor(pad + row if side == "left" else row + pad)), name
    assert ragged["mm_token_type_ids"] == [[0] + [1] * len(wide), [1] * len(small) + [0, 0]]
    assert ragged["offset_mapping"][1] == [(0, 7)] * len(small) + [(8, 10), (11, 13)]


@pytest.mark.filterwarnings("error")
def test_padding_reaches_a_given_length_and_multiple():
    processor = hd_processor()
    given = {"images": picture(0, SMALL), "text": "<image> w1", "return_tensors": "pt"}
    assert processor(**given, padding="max_length", max_length=30)["input_ids"].shape == (1, 30)
    assert processor(**given, padding=True, pad_to_multiple_of=16)["input_ids"].shape == (1, 32)
    assert processor(**given, padding=True, max_length=3)["input_ids"].shape == (1, 18)  # that doesn't truncate


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", [{"truncation": True}, {"truncation": "longest_first"}, {}, {"model": True}])
def test_truncation_takes_words_only(side, how):
    processor = TokenPackerHDProcessor(plain_processor(specials=True))
    processor.tokenizer.truncation_side = side
    image = picture(0, WIDE)
    long = "w1 w2 w3 <image> w4 w5 w6"
    short = long.removeprefix("w1 ") if side == "left" else long.removesuffix(" w6")
    expected = processor([image], [short])
    limit = len(expected["input_ids"][0])
    options = how | {"max_length": limit}
    if how.pop("model", False):
        processor.tokenizer.model_max_length = limit
        options = {"truncation": True}
    inputs = processor([image], ["w1 w2", long], **options)
    assert inputs["input_ids"] == [[1, *words("w1 w2"), 2], expected["input_ids"][0]]
    assert inputs["attention_mask"][1] == [1] * limit


def test_truncation_never_cuts_a_picture():
    processor = TokenPackerHDProcessor(plain_processor(specials=True))
    given = {"images": [picture(0, WIDE)], "text": ["<image> w1"], "truncation": True}
    picture_length = len(ids_of(GRIDS[WIDE], 16))
    assert processor(**given, max_length=picture_length + 2)["input_ids"][0][-2:] == [NEWLINE, 2]
    for length in (picture_length + 1, picture_length, picture_length - 1, 17, 1):
        with pytest.raises(ValueError, match=f"max_length={length} would cut an image of prompt 0: images take 68"):
            processor(**given, max_length=length)
    with pytest.raises(ValueError, match="would cut an image of prompt 1"):
        processor([picture(0, WIDE)], ["w1", "w1 w2 <image>"], truncation=True, max_length=picture_length + 3)
    assert len(processor(**given | {"truncation": False}, max_length=9)["input_ids"][0]) == picture_length + 3


def test_the_default_separators_are_the_tokens_or_the_unknown_one():
    tokenizer = LlamaTokenizer(
        vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "<image>": 4, ",": 5, "▁": 6, "a": 7}, merges=[]
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    plain = LlavaProcessor(LLAVA.processor().image_processor, tokenizer, 14, "default", num_additional_image_tokens=1)
    processor = TokenPackerHDProcessor(plain)
    assert processor.separator_ids == (5, tokenizer.unk_token_id)
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    processor = TokenPackerHDProcessor(plain, separators=(5, newline))
    assert processor.separator_ids == (5, newline)
    ids = processor(picture(0, WIDE), "<image>a")["input_ids"][0]
    assert (ids.count(5), ids.count(newline), ids.count(0)) == (2, 2, 0)


def test_a_missing_separator_must_be_given_and_the_placeholder_be_known():
    plain = plain_processor()
    plain.tokenizer.convert_tokens_to_ids = lambda tokens: IMAGE if isinstance(tokens, str) else [COMMA, None]
    with pytest.raises(ValueError, match=r"no newline, and no unknown token .* separators=\(comma_id, newline_id\)"):
        TokenPackerHDProcessor(plain)
    assert TokenPackerHDProcessor(plain, separators=[COMMA, NEWLINE]).separator_ids == (COMMA, NEWLINE)
    plain.image_token_id = 5
    with pytest.raises(ValueError, match="'<image>' is not a token of this tokenizer"):
        TokenPackerHDProcessor(plain, separators=[COMMA, NEWLINE])


@pytest.mark.parametrize("separators", [(1,), (1, 2, 3), (-1, 5), (5, 47), (5, 6.0), (True, 6), 5, "ab", ()])
def test_separators_must_be_two_ids_of_the_tokenizer(separators):
    with pytest.raises(ValueError, match=r"separators must be two token ids in 0\.\.46"):
        hd_processor(separators=separators)


# The wrapped processor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tiles": 10}, "max_tiles must be one of 9, 16, 25, got 10"),
        ({"thumbnail": "best"}, 'thumbnail must be "released" or "sound"'),
        ({"separators": (IMAGE, NEWLINE)}, "a separator can't be 4, the placeholder"),
        ({"processor": tiny.LLAVA_NEXT.processor()}, "of a LLaVA model, got LlavaNextProcessor"),
        ({"processor": hd_processor()}, "got TokenPackerHDProcessor"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(TypeError if "processor" in change else ValueError, match=message):
        TokenPackerHDProcessor(**{"processor": plain_processor(), **change})


@pytest.mark.parametrize(
    ("height", "width", "patch_size", "message"),
    [
        (56, 42, 14, r"a tile must be a square .* crop_size is \{'height': 56, 'width': 42\}"),
        (60, 60, 14, "60 x 60 pixels is not made of whole patches: the processor's patch_size is 14"),
        (56, 56, None, "patch_size is None"),
    ],
)
def test_a_tile_that_the_model_can_not_take_is_refused(height, width, patch_size, message):
    processor = hd_processor()
    processor.image_processor.crop_size = {"height": height, "width": width}
    processor.processor.patch_size = patch_size
    with pytest.raises(ValueError, match=message):
        processor(picture(0), "<image>")


def test_everything_else_is_the_wrapped_processors():
    processor = hd_processor()
    plain = processor.processor
    assert isinstance(processor, ProcessorMixin)
    assert (processor.tokenizer, processor.image_processor) == (plain.tokenizer, plain.image_processor)
    assert (processor.image_token, processor.image_token_id) == ("<image>", IMAGE)
    assert (processor.decode([5, 6]), processor.batch_decode([[5], [7]])) == ("w0 w1", ["w0", "w2"])
    assert processor.post_process_image_text_to_text([[5, 2]]) == ["w0"]
    assert processor.model_input_names == plain.model_input_names
    assert "max_tiles" in repr(processor)
    assert not hasattr(processor, "no_such_thing")
    processor.chat_template, processor.tokenizer = "a template", tiny.tokenizer()
    assert (plain.chat_template, plain.tokenizer) == (processor.chat_template, processor.tokenizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda processor: pickle.loads(pickle.dumps(processor))])
def test_a_copy_stands_on_its_own(copied):
    processor = hd_processor(max_tiles=16)
    other = copied(processor)
    processor.processor.patch_size = 28
    assert (other.max_tiles, other.tokens_per_tile, processor.tokens_per_tile) == (16, 16, 4)


def test_the_number_of_tokens_is_known_from_the_size():
    processor = hd_processor()
    counts = processor._get_num_multimodal_tokens([(size[1], size[0]) for size in GRIDS])
    lengths = [len(processor(picture(0, size), "<image>")["input_ids"][0]) for size in GRIDS]
    assert counts.num_image_tokens == lengths
    assert counts.num_image_patches == [4, 3, 1]
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ part['text'] }} {% endgeneration %}"
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def test_chat_templates_go_through_the_tiles():
    processor = hd_processor()
    processor.chat_template = TEMPLATE
    image = picture(0, WIDE)
    question = [{"type": "image", "image": image}, {"type": "text", "text": "w1 w2"}]
    answer = [{"type": "text", "text": "w3 w4"}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert processor.apply_chat_template(chat) == "<image> w1 w2 w3 w4 "
    options = {"tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(chat, **options, return_tensors="pt", return_assistant_tokens_mask=True)
    expected = processor(image, "<image> w1 w2 w3 w4", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.as_tensor(inputs["assistant_masks"]).tolist() == [[0] * (len(expected["input_ids"][0]) - 2) + [1, 1]]
    padded = {"padding": True, "padding_side": "left"}
    batch = processor.apply_chat_template([chat, chat[1:]], **options, processor_kwargs=padded)
    assert batch["input_ids"][0] == expected["input_ids"][0].tolist()
    assert batch["input_ids"][1][-2:] == words("w3 w4")


def test_settings_are_saved_beside_the_wrapped_processor(tmp_path):
    processor = hd_processor(max_tiles=16, thumbnail="sound", separators=(COMMA, 7))
    processor.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="call push_to_hub"):
        processor.save_pretrained(tmp_path, push_to_hub=True)
    processor.save_pretrained(tmp_path)
    settings = {"vltok_version": vltok.__version__, "max_tiles": 16, "thumbnail": "sound", "separators": [COMMA, 7]}
    assert json.loads((tmp_path / "vltok_hd.json").read_text()) == settings
    given = {"images": picture(0, WIDE), "text": "<image> w1", "return_tensors": "pt"}
    loaded = TokenPackerHDProcessor.from_pretrained(tmp_path)
    assert type(loaded.processor) is LlavaProcessor
    assert loaded.chat_template == TEMPLATE
    for other in (loaded, TokenPackerHDProcessor.from_pretrained(tmp_path, processor=plain_processor())):
        old, new = processor(**given), other(**given)
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", "must hold a JSON object"),
        ("{}", "must have the fields max_tiles, separators, thumbnail, vltok_version"),
        ('{"vltok_version": "9", "max_tiles": 9, "thumbnail": "sound"}', "must have the fields"),
        ('{"vltok_version":"9","max_tiles":[9],"thumbnail":"sound","separators":null}', "vltok 9.* max_tiles must be"),
        ('{"vltok_version":"9","max_tiles":9,"thumbnail":["sound"],"separators":null}', "thumbnail must be"),
        ('{"vltok_version":"9","max_tiles":9,"thumbnail":"sound","separators":{"a":1}}', "separators must be"),
        ('{"vltok_version":"9","max_tiles":9e999,"thumbnail":"sound","separators":null}', "must be finite"),
        ("[" * 100_000, "is not a JSON file"),
        ('{"vltok_version":"9","max_tiles":36,"thumbnail":"sound","separators":null}', "vltok 9.* max_tiles must be"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, content, message):
    with pytest.raises(FileNotFoundError, match=r"has no vltok_hd\.json"):
        TokenPackerHDProcessor.from_pretrained(tmp_path)
    (tmp_path / "vltok_hd.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        TokenPackerHDProcessor.from_pretrained(tmp_path, processor=plain_processor())
