"""Every family that can be pruned can be trained: its processor's batches are right, and each weight has its part."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import TinyFamily, clip, picture
from train.records import record
from zoo import gemma, glm, late, qwen, tiles

import vltok
from vltok.train import Collator, SampleError, set_trainable
from vltok.train.collator import IGNORE
from vltok.train.trainable import PARTS, parts_of

ROWS = [*tiny.ALL, *qwen.ROWS, *gemma.ROWS, *glm.ROWS, *late.ROWS, *tiles.ROWS]
KNOWN = [row for row in {row.key: row for row in ROWS}.values() if row.name in vltok.supported_models()["vlm"]]
ONE_IMAGE = {"got_ocr2-no-cls", "got_ocr2-crops-no-cls"}  # whose processors take one image for a prompt, no less
every_family = pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.key)
METHOD = vltok.DivPrune(num_keep=3)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}"
    "{{ '%image ' if c.type == 'image' else '%video ' if c.type == 'video' else c.text }}{% endfor %}"
    "{% if m.role == 'assistant' %} </s> {% endif %}{% endfor %}"
)


def collator_of(family: TinyFamily, **settings) -> Collator:
    processor = family.processor()
    processor.chat_template = TEMPLATE.replace("%image", family.image).replace("%video", family.video)
    return Collator(processor, **settings)


def samples(family: TinyFamily, asks_once: bool) -> tuple[list[dict], list[str]]:
    """Samples with several numbers of media, and the answers."""
    first, second = picture(0, family.size), picture(1, family.other_size)
    rows = [record("one", [first], "<image>\nw1 w2", "w3 w4"), record("other", [second], "w1 <image>", "w5")]
    answers = ["w3 w4 </s>", "w5 </s>"]
    if family.key not in ONE_IMAGE:
        rows.append(record("two", [first, second], "<image>w1<image> w2", "w11 w12"))
        answers.append("w11 w12 </s>")
    if not asks_once:
        rows.append(record("turns", [second], "w1 <image> w2", "w6", "w7", "w8 w9"))
        answers.append("w6 </s> w8 w9 </s>")
    if not asks_once and family.key not in ONE_IMAGE:
        rows.append(record("none", [], "w1", "w17"))
        answers.append("w17 </s>")
    if family.video and family.mixes:
        video = clip(3, family.size, family.frames)
        rows.append({**record("video", [first], "<video> w1 <image>", "w20 w21"), "video": [video]})
        answers.append("w20 w21 </s>")
    return rows, answers


@every_family
def test_a_batch_has_the_labels_and_the_loss_of_its_samples_alone(family: TinyFamily):
    collator = collator_of(family)
    rows, answers = samples(family, asks_once=collator.write.style == "suffix")
    batch = collator(rows)
    decode = collator.processor.tokenizer.decode
    assert [decode(row[row != IGNORE]) for row in batch["labels"]] == answers
    model = family.model()
    with vltok.apply(model, METHOD), torch.no_grad():
        whole = model(**batch).loss
        alone = [collator([row]) for row in rows]
        counts = [(each["labels"] != IGNORE).sum() for each in alone]
        expected = sum(model(**each).loss * count for each, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=0)


@every_family
def test_a_prompt_that_is_too_long_loses_its_last_image_whole(family: TinyFamily):
    collator = collator_of(family)
    if collator.write.style == "suffix" or family.key in ONE_IMAGE:
        row = record("s", [picture(0, family.size)], "<image>w1", "w2")
        short = collator_of(family, max_length=len(collator([row])["labels"][0]) - 2)
        with pytest.raises(SampleError, match="no answer within max_length"):
            short([row])
        return
    images = [picture(index, family.size) for index in range(3)]
    row = record("s", images, "<image><image>w1", "w2", "w3 <image>", "w4")
    first = collator([record("s", images[:2], "<image><image>w1", "w2")])
    whole = collator([row])
    short = collator_of(family, max_length=whole["labels"].shape[1] - 5)([row])  # the last answer and its question
    decode = collator.processor.tokenizer.decode
    assert decode(short["labels"][0][short["labels"][0] != IGNORE]) == "w2 </s>"
    length = first["input_ids"].shape[1]
    assert torch.equal(short["input_ids"][:, :length], first["input_ids"])
    assert short["input_ids"].shape[1] - length <= 8  # the second question, without its image
    pixels = next(key for key in first if key.startswith("pixel_values"))
    assert torch.equal(short[pixels], first[pixels])
    family.model()(**short)  # as many placeholders as features


@every_family
def test_every_weight_belongs_to_one_part(family: TinyFamily):
    handle = vltok.apply(family.model(), METHOD)
    parts = parts_of(handle)
    found = [id(parameter) for part in PARTS for parameter in parts[part]]
    assert sorted(found) == sorted(id(parameter) for parameter in handle.model.parameters())
    assert all(parts.values())
    decoder = {id(parameter) for parameter in getattr(handle.host, family.decoder).parameters()}
    assert decoder <= {id(parameter) for parameter in parts["llm"]}
    assert all(set_trainable(handle, "full").values())
    assert all(parameter.requires_grad for parameter in handle.model.parameters())


@every_family
def test_a_batch_of_texts_gets_an_image_of_which_nothing_is_learned(family: TinyFamily):
    collator, plain = collator_of(family), collator_of(family, always_picture=False)
    if collator.write.style == "suffix" or family.key in ONE_IMAGE:
        with pytest.raises(SampleError, match="images"):
            collator([record("none", [], "w1", "w2")])
        return
    rows = [record("long", [], "w1", "w2 w3 w4"), record("short", [], "w5", "w6")]
    model = family.model()
    batch, texts = collator(rows), plain(rows)
    assert any(key.startswith("pixel_values") for key in batch) and not any("pixel" in key for key in texts)
    with vltok.apply(model, METHOD), torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**texts).loss, rtol=1e-4, atol=0)
