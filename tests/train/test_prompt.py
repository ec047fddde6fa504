"""Prompts come out as the published styles write them, and the places of the answers are exact."""

from __future__ import annotations

import pytest
from tiny import LLAVA, LLAVA_ONEVISION, QWEN2_5_VL
from zoo.gemma import PALIGEMMA

from vltok.train import PromptWriter, Sample, SampleError, Turn
from vltok.train.prompt import _parts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
)
# Ends no answer, puts pictures first and trims what it is given.
OPEN = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text | trim }} {% endfor %}{% endfor %}"
)
PLAIN = Sample("s", (Turn("user", "<image>\nw1"), Turn("assistant", "w2 w3")), ("1.png",))
LONG = Sample(
    "s",
    (
        Turn("system", "w0"),
        Turn("user", "w1\n<image>"),
        Turn("assistant", "w2"),
        Turn("user", "w3 <image> and <image>"),
        Turn("assistant", " w4 </think> "),
    ),
    ("1.png", "2.png", "3.png"),
)


def processor(template=None, of="processor", family=LLAVA):
    found = family.processor()
    found.tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    (found if of == "processor" else found.tokenizer).chat_template = template
    return found


def written(sample, *args, **kwargs):
    """The text, and what of it is to be learned."""
    prompt = PromptWriter(*args, **kwargs)(sample)
    return prompt.text, [prompt.text[start:stop] for start, stop in prompt.answers]


def test_vicuna_is_what_llava_15_was_trained_on():
    assert written(PLAIN, processor()) == ("USER: <image>\nw1 ASSISTANT: w2 w3</s>", ["w2 w3</s>"])
    assert written(LONG, processor(), "vicuna") == (
        "w0 USER: <image>\nw1 ASSISTANT: w2</s>USER: w3 <image> and <image> ASSISTANT:  w4 </think> </s>",
        ["w2</s>", " w4 </think> </s>"],
    )


def test_vicuna_writes_the_processors_own_placeholder():
    assert written(PLAIN, processor(family=QWEN2_5_VL))[0] == "USER: <|image_pad|>\nw1 ASSISTANT: w2 w3</s>"


def test_plain_is_the_picture_and_its_caption():
    assert written(PLAIN, processor(CHATML), "plain") == ("<image>w2 w3\n", ["w2 w3\n"])
    with pytest.raises(SampleError, match="one question and its answer, got 4 turns"):
        written(LONG, processor(), "plain")


def test_a_processors_template_gets_pictures_as_parts_and_its_end_token_is_learned():
    assert written(LONG, processor(CHATML)) == (
        "<|im_start|>system\nw0<|im_end|>\n<|im_start|>user\nw1<image><|im_end|>\n<|im_start|>assistant\nw2<|im_end|>\n"
        "<|im_start|>user\nw3 <image> and <image><|im_end|>\n<|im_start|>assistant\n w4 </think> <|im_end|>\n",
        ["w2<|im_end|>", " w4 </think> <|im_end|>"],
    )


def test_a_tokenizers_template_gets_pictures_as_text():
    text, answers = written(LONG, processor(CHATML, of="tokenizer"))
    assert text.startswith("<|im_start|>system\nw0<|im_end|>\n<|im_start|>user\n<image>\nw1<|im_end|>\n")
    assert answers == ["w2<|im_end|>", " w4 </think> <|im_end|>"]


def test_answers_that_a_template_leaves_open_are_ended_and_kept_as_they_are():
    assert written(LONG, processor(OPEN)) == (
        "SYSTEM: w0 USER: <image>\nw1 ASSISTANT: w2</s> USER: <image>\n<image>\nw3 and ASSISTANT:  w4 </think> </s> ",
        ["w2</s>", " w4 </think> </s>"],
    )


def test_blanks_before_the_end_token_are_learned_with_it():
    template = "{% for m in messages %}{{ m.content[-1].text }} </s>{% endfor %}"
    sample = Sample("s", (Turn("user", "w1"), Turn("assistant", "w2")))
    assert written(sample, processor(template)) == ("w1 </s>w2 </s>", ["w2 </s>"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}", "1 images, but its text comes out with 0"),
        ("<image>", "leaves out or repeats answers"),
        ("<image>{{ messages[1].content[0].text }}{{ messages[1].content[0].text }}", "leaves out or repeats"),
        ("{{ raise_exception('only w7') }}", "the chat template refuses it: only w7"),
    ],
)
def test_a_template_that_loses_something_is_an_error_that_names_the_sample(template, message):
    with pytest.raises(SampleError, match=r"^s") as error:
        written(PLAIN, processor(template))
    assert message in str(error.value)


def test_a_turn_with_the_processors_own_placeholder_or_the_mark_is_refused():
    turns = (Turn("user", "<|image_pad|>"), Turn("assistant", "w2"))
    with pytest.raises(SampleError, match="contains that token"):
        written(Sample("s", turns), processor(family=QWEN2_5_VL))
    with pytest.raises(SampleError, match=r"U\+E000"):
        written(Sample("s", (Turn("user", "\ue0000\ue001"), turns[1])), processor())


def test_a_style_that_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="auto, chat, vicuna, plain, suffix, got 'llama'"):
        PromptWriter(processor(), "llama")
    with pytest.raises(ValueError, match="has none"):
        PromptWriter(processor(), "chat")
    without_end = processor()
    without_end.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        PromptWriter(without_end, "vicuna")
    without_end.chat_template = OPEN
    with pytest.raises(SampleError, match="doesn't end answers"):
        written(PLAIN, without_end)


GENERATED = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}"
    "think {{ m.content[-1].text | trim }}{{ END }}{% endgeneration %}{{ REST }}{% else %}"
    "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %} {% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("inside", "behind", "learned"),
    [
        ("<|im_end|>", "", ["think w2<|im_end|>", "think w4 </think><|im_end|>"]),
        ("<|im_end|>\n", "", ["think w2<|im_end|>", "think w4 </think><|im_end|>"]),  # the line is not the answer's
        ("", "<|im_end|>\n", ["think w2<|im_end|>", "think w4 </think><|im_end|>"]),  # or nothing would teach to stop
        ("", " <|im_end|>", ["think w2 <|im_end|>", "think w4 </think> <|im_end|>"]),
        ("", " ", ["think w2</s>", "think w4 </think></s>"]),
    ],
)
def test_what_a_template_marks_as_generated_is_learned_with_its_end(inside, behind, learned):
    template = GENERATED.replace("{{ END }}", inside).replace("{{ REST }}", behind)
    writer = PromptWriter(processor(template))
    assert writer.answers_by == "template"
    prompt = writer(LONG)
    assert prompt.learned == learned
    rendered = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    others = writer.processor.apply_chat_template(
        [{"role": turn.role, "content": _parts(turn.text)} for turn in LONG.turns], chat_template=rendered
    )
    assert prompt.text.replace("</s>", "") == others


def test_a_template_that_generates_nothing_here_is_an_error():
    template = "<image>{% if messages | length > 9 %}{% generation %}w1{% endgeneration %}{% endif %}"
    with pytest.raises(SampleError, match="s: the chat template marks none of its answers as generated"):
        written(PLAIN, processor(template))


def test_videos_are_parts_of_a_message_and_placeholders_of_a_text():
    film = Sample("s", (Turn("user", "w1 <video> <image>"), Turn("assistant", "w2")), ("1.png",), ("1.mp4",))
    template = CHATML.replace("'<image>' if c.type == 'image'", "'<%s>' % c.type if c.type != 'text'")
    text = written(film, processor(template, family=LLAVA_ONEVISION))[0]
    assert text.startswith("<|im_start|>user\nw1 <video> <image><|im_end|>")
    assert written(film, processor(family=QWEN2_5_VL))[0] == "USER: w1 <|video_pad|> <|image_pad|> ASSISTANT: w2</s>"
    with pytest.raises(SampleError, match="s has videos, and LlavaProcessor takes none"):
        written(film, processor())


def test_a_processor_that_takes_answers_apart_gets_them_so_and_in_no_other_way():
    found = PALIGEMMA.processor()
    prompt = PromptWriter(found)(PLAIN)
    assert (prompt.text, prompt.suffix, prompt.answers) == ("<image>w1", "w2 w3", ())
    with pytest.raises(SampleError, match="one question and its answer, got 4 turns"):
        PromptWriter(found)(LONG)
    with pytest.raises(ValueError, match="PaliGemmaProcessor takes answers as a suffix alone, got style='vicuna'"):
        PromptWriter(found, "vicuna")
    with pytest.raises(ValueError, match="LlavaProcessor takes no answers as a suffix, got style='suffix'"):
        PromptWriter(processor(), "suffix")
