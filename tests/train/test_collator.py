"""Batches hold pictures whole and labels on the answers alone, for every family, style and kind of tokenizer."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from PIL import Image
from tiny import LLAVA, LLAVA_NEXT, QWEN2_5_VL, TinyFamily, picture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from train.records import record
from transformers import PreTrainedTokenizerFast
from transformers.video_utils import VideoMetadata

import vltok
from vltok.processing import TokenPackerHDProcessor
from vltok.train import BadImageError, Collator, SampleError
from vltok.train.collator import IGNORE, tokens_in

FAMILIES = {f"{family.name}-{family.has_cls}": family for family in tiny.ALL}
# The placeholder stands where each family has it; every answer ends in </s>.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}{{ '%s ' if c.type == 'image' else c.text }}"
    "{% endfor %}{% if m.role == 'assistant' %} </s> {% endif %}{% endfor %}"
)


def processor(family: TinyFamily, style: str = "chat"):
    found = family.processor()
    found.chat_template = TEMPLATE.replace("%s", family.image) if style == "chat" else None
    return found


def conversations(family: TinyFamily) -> list[dict]:
    first, second = picture(0, family.size), picture(1, family.other_size)
    return [
        record("one", [first], "<image>\nw1 w2", "w3 w4"),
        record("turns", [second], "w1 <image> w2", "w5", "w6 w7", "w8 w9 w10"),
        record("two", [first, second], "<image>w1<image> w2", "w11 w12"),
        record("later", [first, second], "<image>w1", "w13 w14", "w2 <image> w3", "w15", "w4", "w16"),
        record("none", [], "w1 w2", "w17"),
    ]


ANSWERS = ["w3 w4 </s>", "w5 </s> w8 w9 w10 </s>", "w11 w12 </s>", "w13 w14 </s> w15 </s> w16 </s>", "w17 </s>"]


def learned(collator: Collator, batch: dict) -> list[str]:
    """What the labels of each sample say."""
    return [collator.processor.tokenizer.decode(row[row != IGNORE]) for row in batch["labels"]]


@pytest.mark.parametrize("style", ["chat", "vicuna"])
@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_the_answers_and_their_end_tokens(name, style):
    family = FAMILIES[name]
    collator = Collator(processor(family, style), style=style)
    batch = collator(conversations(family))
    assert learned(collator, batch) == ANSWERS
    is_learned = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][is_learned], batch["input_ids"][is_learned])
    assert not (is_learned & (batch["attention_mask"] == 0)).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_what_the_processor_makes_of_each_prompt(name):
    """The processor is asked for single prompts, and for the pictures of all prompts at once."""
    family = FAMILIES[name]
    collator = Collator(processor(family), always_picture=False)
    samples = conversations(family)
    batch = collator(samples)
    pictures = [sample["image"] for sample in samples if "image" in sample]
    prompts = [family.image * len(own) for own in pictures]
    whole = collator.processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    for key in ("pixel_values", "image_sizes", "image_grid_thw"):
        assert (key in batch) == (key in whole)
        if key in whole:
            torch.testing.assert_close(batch[key], whole[key], rtol=0, atol=0)
    for row, sample in enumerate(samples):
        single = collator([sample])
        length = single["input_ids"].shape[1]
        for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
            assert (key in batch) == (key in single)
            if key in batch:
                assert torch.equal(batch[key][row, :length], single[key][0])
        assert not batch["attention_mask"][row, length:].any()
        assert (batch["labels"][row, length:] == IGNORE).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_only_answers_enter_the_loss_and_its_gradients(name):
    family = FAMILIES[name]
    model = tiny.shared_model(family)
    batch = Collator(processor(family))(conversations(family))
    embeddings = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: embeddings.append(output))
    output = model(**batch)
    hook.remove()
    loss, tokens = 0.0, 0
    for row in range(len(batch["labels"])):
        for place in range(1, batch["labels"].shape[1]):
            if batch["labels"][row, place] != IGNORE:
                scores = output.logits[row, place - 1].double().log_softmax(-1)
                loss, tokens = loss - scores[batch["labels"][row, place]], tokens + 1
    torch.testing.assert_close(output.loss.double(), loss / tokens, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(output.loss, embeddings[0])
    touched = gradient.abs().sum(-1) > 0
    assert torch.equal(touched[:, :-1], batch["labels"][:, 1:] != IGNORE)
    assert not touched[:, -1].any()


def bpe(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of word parts that writes <s> first: of bytes like Qwen, or with word marks like Llama."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    if kind == "bytes":
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=tiny.SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["USER: What is on the table? ASSISTANT: A cat, two dogs.\nit"] * 9, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(("kind", "sign"), [("bytes", "\U0001f408"), ("marks", "cats")])
def test_labels_are_exact_where_tokens_are_parts_of_words(kind, sign):
    found = LLAVA.processor()
    found.tokenizer = bpe(kind)
    found.image_token_id = found.tokenizer.convert_tokens_to_ids("<image>")
    answers = ["A cat, two dogs.", f"the {sign} on\nit", "is"]
    turns = ["<image>\nWhat is on the table?", answers[0], "What?", answers[1], "<image>", answers[2]]
    collator = Collator(found, style="vicuna")
    batch = collator([record("s", [picture(0), picture(1)], *turns)])
    assert batch["input_ids"][0, 0] == found.tokenizer.bos_token_id
    assert (batch["input_ids"] == found.image_token_id).sum() == 32
    said = found.tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORE])
    assert [part.strip() for part in said.removesuffix("</s>").split("</s>")] == answers


def test_a_template_that_writes_the_first_token_gets_no_second_one():
    found = LLAVA.processor()
    found.tokenizer = bpe("bytes")
    found.image_token_id = found.tokenizer.convert_tokens_to_ids("<image>")
    found.chat_template = "<s>" + TEMPLATE.replace("%s", "<image>")
    ids = Collator(found)([record("s", [picture(0)], "<image>What?", "A cat")])["input_ids"][0].tolist()
    assert ids.count(found.tokenizer.bos_token_id) == 1 and ids[0] == found.tokenizer.bos_token_id


@pytest.mark.parametrize("style", ["vicuna", "plain"])
def test_tiles_with_separators_between_them_keep_their_labels(style):
    model, base = LLAVA.model(), LLAVA.processor()
    base.tokenizer.add_tokens([",", "\n"])
    with vltok.apply(model, vltok.TokenPacker(scale_factor=2), processor=base):
        found = TokenPackerHDProcessor(base, max_tiles=9)
        comma = found.separator_ids[0]
        images = [picture(0, (150, 60)), picture(1, (56, 170))]
        rows = [record("a", images[:1], "<image>", ", w3 w4"), record("b", images[1:], "<image>", "w5 ,")]
        if style == "vicuna":
            rows += [record("c", images, "<image>w1", "w6 ,", ", <image> ,", ", w7")]
        collator = Collator(found, style=style)
        batch = collator(rows)
    end = "</s>" if style == "vicuna" else "\n"
    assert learned(collator, batch) == [f", w3 w4 {end}", f"w5 , {end}", "w6 , </s> , w7 </s>"][: len(rows)]
    assert (batch["input_ids"][0] == comma).sum() == 3  # one of the answer, two between three tiles
    assert (batch["input_ids"] == found.image_token_id).sum() == 4 * len(batch["pixel_values"])


# 1 + 16 + 2 + 1 tokens for "USER: <image> w1 w2 ASSISTANT:", then answers
CUT = record("s", [picture(0), picture(1)], "<image>w1 w2", "w3 w4", "<image>w5", "w6 w7")


@pytest.mark.parametrize(
    ("max_length", "tokens", "pictures", "words"),
    [
        (99, 45, 2, "w3 w4 </s> w6 w7 </s>"),
        (44, 44, 2, "w3 w4 </s> w6 w7"),
        (41, 41, 2, "w3 w4 </s>"),
        (40, 40, 2, "w3 w4 </s>"),
        (39, 24, 1, "w3 w4 </s>"),  # one token less than the second picture needs: it goes, and what is behind it
        (25, 24, 1, "w3 w4 </s>"),
        (22, 22, 1, "w3 w4"),
    ],
)
def test_a_conversation_that_is_too_long_loses_its_end_and_no_part_of_a_picture(max_length, tokens, pictures, words):
    collator = Collator(processor(LLAVA, "vicuna"), max_length=max_length)
    batch = collator([CUT])
    assert batch["input_ids"].shape[1] == tokens
    assert len(batch["pixel_values"]) == pictures
    assert (batch["input_ids"] == 4).sum() == 16 * pictures
    assert learned(collator, batch) == [words]
    whole = Collator(processor(LLAVA, "vicuna"))([CUT])
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(batch[key], whole[key][:, :tokens])
    assert torch.equal(batch["pixel_values"], whole["pixel_values"][:pictures])


@pytest.mark.parametrize("max_length", [20, 16, 1])
def test_a_sample_without_an_answer_left_is_an_error_or_is_dropped_and_counted(max_length, caplog):
    with pytest.raises(SampleError, match=f"sample 's' has no answer within max_length={max_length}"):
        Collator(processor(LLAVA, "vicuna"), max_length=max_length)([CUT])
    collator = Collator(processor(LLAVA, "vicuna"), max_length=max_length, on_too_long="drop", always_picture=False)
    with caplog.at_level(logging.WARNING):
        batch = collator([CUT, record("t", [], "w1", "w2")])
    assert batch["input_ids"].shape[1] <= max_length
    assert (batch["labels"][0] == IGNORE).all()
    assert len(batch.get("pixel_values", ())) == (max_length >= 17)
    assert collator.dropped["too long"] == (2 if max_length == 1 else 1)
    assert "sample 's'" in caplog.text


@pytest.mark.parametrize("family", [LLAVA, LLAVA_NEXT, QWEN2_5_VL], ids=lambda family: family.name)
def test_a_picture_that_cannot_be_opened_is_an_error_or_is_dropped_warned_of_and_counted(family, tmp_path, caplog):
    good = record("good", [picture(0, family.size)], "<image>w1", "w2")
    bad = record("bad", [str(tmp_path / "missing.png")], "<image>w1", "w3")
    with pytest.raises(BadImageError, match=r"sample 'bad': can't open .*missing.png"):
        Collator(processor(family))([good, bad])
    collator = Collator(processor(family), on_bad_image="drop")
    with caplog.at_level(logging.WARNING):
        batch = collator([good, bad])
    assert "sample 'bad': can't open" in caplog.text and "missing.png" in caplog.text
    assert collator.dropped == {"bad image": 1, "too long": 0}
    assert learned(collator, batch) == ["w2 </s>", ""]
    model = tiny.shared_model(family)
    torch.testing.assert_close(model(**batch).loss, model(**Collator(processor(family))([good])).loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_texts_gets_a_picture_that_changes_no_loss_and_no_gradient(name):
    family = FAMILIES[name]
    rows = [record("long", [], "w1 w2", "w3 w4 w5", "w6", "w7"), record("short", [], "w8", "w9")]
    with_picture = Collator(processor(family))(rows)
    without = Collator(processor(family), always_picture=False)(rows)
    assert "pixel_values" in with_picture and "pixel_values" not in without
    assert learned(Collator(processor(family)), with_picture) == ["w3 w4 w5 </s> w7 </s>", "w9 </s>"]
    model = family.model()
    loss = model(**with_picture).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**without).loss, rtol=1e-6, atol=0)
    projector = [p for key, p in model.named_parameters() if "projector" in key or "merger" in key]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in projector)


def test_a_text_that_was_cut_stays_cut_where_it_gets_a_picture():
    rows = [record("s", [], "w1", "w2 " * 30)]
    cut = Collator(processor(LLAVA), max_length=12, always_picture=False)(rows)
    batch = Collator(processor(LLAVA), max_length=12)(rows)
    assert cut["labels"].shape[1] == 12
    for key, value in cut.items():
        assert torch.equal(batch[key][:, :12], value)
    assert (batch["input_ids"][:, 12:] == 4).all() and (batch["labels"][:, 12:] == IGNORE).all()
    assert len(batch["pixel_values"]) == 1


def test_workers_count_what_they_drop(tmp_path):
    missing = str(tmp_path / "missing.png")
    rows = [record(f"s{i}", [missing] * (i % 2), "<image>" * (i % 2) + "w1", "w2") for i in range(8)]
    collator = Collator(processor(LLAVA), on_bad_image="drop")
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=2)
    assert len(list(loader)) == 4
    assert collator.dropped["bad image"] == 4


def test_pictures_are_padded_to_a_square_in_the_mean_colour():
    wide = record("s", [Image.new("RGB", (84, 42), (255, 0, 0))], "<image>w1", "w2")
    found = processor(LLAVA)
    found.image_processor.do_center_crop = False
    found.image_processor.size = {"height": 56, "width": 56}
    pixels = Collator(found, pad_to_square=True)([wide])["pixel_values"][0]
    rows = pixels[:, :, 28]
    assert (rows[:, :12].abs() < 0.02).all() and (rows[:, -12:].abs() < 0.02).all()  # the mean is 0 after normalisation
    assert (rows[0, 20:36] > 1.5).all()


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match='on_bad_image must be "raise" or "drop", got \'skip\''):
        Collator(processor(LLAVA), on_bad_image="skip")
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        Collator(processor(LLAVA), max_length=0)


def test_a_processor_that_rewrites_answers_or_tokenises_them_elsewhere_is_an_error_that_names_the_sample():
    class Rewriting(type(LLAVA.processor())):
        def __call__(self, text, **options):
            return super().__call__(text=[text[0].replace("w2", "w9")], **options)

    class Elsewhere(type(LLAVA.processor())):
        def __call__(self, text, **options):
            return LLAVA.processor()(text=text, **options)

    found = processor(LLAVA, "vicuna")
    found.__class__ = Rewriting
    with pytest.raises(
        SampleError, match=r"sample 's': Rewriting refuses it: it makes \['w9</s>'\] of .* \['w2</s>'\]"
    ):
        Collator(found)([record("s", [picture(0)], "<image>w1", "w2")])
    found.__class__ = Elsewhere
    with pytest.raises(SampleError, match="sample 's': its answers can't be followed through Elsewhere"):
        Collator(found)([record("s", [picture(0)], "<image>w1", "w2")])


def test_a_token_that_reaches_into_an_answer_belongs_to_it():
    offsets = [(0, 0), (0, 5), (4, 6), (5, 9), (9, 9), (9, 12)]
    assert tokens_in(offsets, [(5, 9)]) == [False, False, True, True, False, False]
    assert tokens_in(offsets, [(0, 1), (11, 20)]) == [False, True, False, False, False, True]


def test_a_video_in_a_file_is_left_to_the_processor_which_takes_frames_from_it(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"film")
    found = processor(QWEN2_5_VL, "vicuna")
    frames, asked = tiny.clip(0, QWEN2_5_VL.size), []

    def fetch(files, sample_indices_fn=None):
        asked.append(files)
        return [frames], [VideoMetadata(total_num_frames=4, fps=24, frames_indices=[0, 1, 2, 3])]

    monkeypatch.setattr(found.video_processor, "fetch_videos", fetch)
    from_file = Collator(found)([record("s", [], "<video>w1", "w2") | {"video": str(tmp_path / "a.mp4")}])
    assert asked == [[str(tmp_path / "a.mp4")]]
    from_frames = Collator(found)([record("s", [], "<video>w1", "w2") | {"video": frames}])
    assert from_file.keys() == from_frames.keys()
    assert all(torch.equal(from_file[key], from_frames[key]) for key in from_file)
