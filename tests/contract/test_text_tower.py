"""A selector that reads the question in CLIP's space, with a CLIP model beside the vision-language model."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from prompts import batch, generate, single
from text_towers import BEGIN, END, clip_model, clip_tokenizer
from tiny import TinyFamily, shared_model
from torch import nn
from versions import orders_repeated_images

import vltok
from vltok.errors import CheckpointError, UnsupportedInputError, UnsupportedModelError
from vltok.methods.pruning.cdpruner import CDPruner, clip_relevance
from vltok.methods.pruning.question import TextSelector
from vltok.visual import Need, VisualTokens

CLIP_TOWERS = [tiny.LLAVA, tiny.LLAVA_NEXT]
with_clip = pytest.mark.parametrize("family", CLIP_TOWERS, ids=lambda family: family.key)
METHOD = CDPruner(keep_ratio=0.4, relevance="clip", theta=0.9)
TEMPLATE = (
    "{% for m in messages %}{{ 'w31 ' if m.role == 'user' else 'w32 ' }}"
    "{% for c in m.content %}{{ c.text }}{% endfor %} w33 {% endfor %}{% if add_generation_prompt %}w32 {% endif %}"
)


@dataclass(frozen=True)
class Seeing(TextSelector):
    """Keeps the first tokens, and notes what it was shown."""

    needs_: tuple[Need, ...] = ("clip",)
    seen: list[VisualTokens] = field(default_factory=list, compare=False)

    @property
    def needs(self) -> tuple[Need, ...]:
        return self.needs_

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        self.seen.append(visual)
        return torch.arange(num_keep).expand(len(visual.embeddings), -1)


@pytest.fixture(scope="module")
def text_tower():
    return clip_model(), clip_tokenizer()


@pytest.fixture
def texts(text_tower):
    """The texts that the text tower reads, as ids."""
    read: list[list[int]] = []

    def note(module, args, kwargs):
        read.append(kwargs["input_ids"].tolist()[0])

    hook = text_tower[0].text_model.register_forward_pre_hook(note, with_kwargs=True)
    yield read
    hook.remove()


def shown(family: TinyFamily, inputs, text_tower, processor=None, **knobs) -> list[VisualTokens]:
    """What a selector sees of each image, one by one."""
    method = Seeing(keep_ratio=0.4, **knobs)
    with vltok.apply(shared_model(family), method, processor=processor or family.processor(), text_tower=text_tower):
        shared_model(family)(**inputs)
    return method.seen


def naive_text(clip: nn.Module, segments: list[str]) -> torch.Tensor:
    """The mean of the unit embeddings of some texts, as CLIP embeds them itself."""
    units = []
    for text in segments:
        ids = clip_tokenizer()(text, return_tensors="pt")["input_ids"]
        embedding = clip.get_text_features(input_ids=ids, return_dict=True)
        embedding = getattr(embedding, "pooler_output", embedding)[0]
        units.append(embedding / embedding.norm())
    return sum(units) / len(units)


def kept_by(handle) -> list[list[list[int]]]:
    return [[each.tolist() for each in row] for row in handle.report(file=None).keep_indices]


@torch.no_grad()
def test_both_sides_are_in_the_space_of_clip(text_tower):
    """Compare with CLIP's own modules on the features of the tower, patch by patch."""
    family, clip = tiny.LLAVA, text_tower[0]
    inputs = single(family, "text around")
    (visual,) = shown(family, inputs, text_tower)
    tower = shared_model(family).model.vision_tower
    states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    expected = [clip.visual_projection(clip.vision_model.post_layernorm(patch)) for patch in states[0, 1:]]
    torch.testing.assert_close(visual.clip_image[0], torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(visual.clip_text[0], naive_text(clip, ["w1 w2 w3 w4"]))


@torch.no_grad()
def test_tokens_without_a_patch_are_zero_in_clip(text_tower):
    (visual,) = shown(tiny.LLAVA_NEXT, single(tiny.LLAVA_NEXT, "text around"), text_tower)
    is_newline = (visual.features == 0).all(-1)
    assert is_newline.any()
    assert torch.equal((visual.clip_image == 0).all(-1), is_newline)


@torch.no_grad()
@pytest.mark.parametrize("end", [END, 2], ids=["id", "largest id"])
def test_a_long_question_is_read_in_segments(end):
    clip = clip_model(end=end, length=12)  # ten words and two marks
    question = " ".join(f"w{number}" for number in range(8))  # 16 words of CLIP's
    (visual,) = shown(tiny.LLAVA, single(tiny.LLAVA, "text around"), (clip, clip_tokenizer()), text=question)
    expected = naive_text(clip, ["w0 w1 w2 w3 w4", "w5 w6 w7"])
    torch.testing.assert_close(visual.clip_text[0], expected)
    assert visual.clip_text.norm() < 0.999  # a mean of units that differ


@with_clip
def test_the_question_changes_the_picks(family, text_tower):
    model, inputs = shared_model(family), single(family, "text around")
    with vltok.apply(model, METHOD, processor=family.processor(), text_tower=text_tower) as handle:
        found = set()
        for word in ("w9", "w12", "w30"):
            with handle.using(text=word):
                model(**inputs)
                found.add(str(kept_by(handle)))
    assert len(found) > 1


@with_clip
def test_rows_of_a_batch_ask_their_own_questions_once_each(family, text_tower, texts):
    model, names = shared_model(family), ["two images", "text around", "image first", "text only"]
    with vltok.apply(model, METHOD, processor=family.processor(), text_tower=text_tower) as handle:
        model(**batch(family, names=names))
        together = kept_by(handle)
        assert sorted(texts) == sorted({tuple(text): text for text in texts}.values())
        assert len(texts) == 3
        assert all(text[0] == BEGIN and text[-1] == END and text.count(END) == 1 for text in texts)
        for name, own in zip(names[:3], together, strict=False):
            model(**single(family, name))
            assert kept_by(handle) == [own]
    assert together[3] == []


@pytest.mark.parametrize("beams", [1, pytest.param(2, marks=orders_repeated_images)])
def test_a_growing_answer_is_no_question(text_tower, texts, beams):
    model, inputs = shared_model(tiny.LLAVA), batch(tiny.LLAVA, names=["text around", "image first"])
    with vltok.apply(model, METHOD, processor=tiny.LLAVA.processor(), text_tower=text_tower):
        words = generate(model, inputs, num_beams=beams)
        assert len(texts) == 2
        assert torch.equal(generate(model, inputs, num_beams=beams, use_cache=False), words)
        assert len(texts) == 4


def test_the_last_turn_is_the_question(text_tower, texts):
    family = tiny.LLAVA
    processor = family.processor()
    processor.chat_template = TEMPLATE
    inputs = family.inputs(["w31 w1 w33 w32 w2 w33 w31 w7 <image> w8 w33 w32"], [tiny.picture(3, family.size)])
    shown(family, inputs, text_tower, processor)
    assert texts == [clip_tokenizer()("w7 w8")["input_ids"]]


def test_marks_of_the_prompt_are_no_words(text_tower, texts):
    inputs = tiny.LLAVA.inputs(["<s> w1 <image> w2 </s>"], [tiny.picture(0, tiny.LLAVA.size)])
    shown(tiny.LLAVA, inputs, text_tower)
    assert texts == [clip_tokenizer()("w1 w2")["input_ids"]]


def test_the_text_tower_takes_no_part_in_training_or_autocast(text_tower):
    family, (clip, _) = tiny.LLAVA, text_tower
    model, inputs = family.model(), single(family, "text around")
    before = [weight.clone() for weight in clip.parameters()]
    names = list(model.state_dict())
    with vltok.apply(model, METHOD, processor=family.processor(), text_tower=text_tower) as handle:
        assert list(model.state_dict()) == names
        model.to(torch.float64)
        assert clip.dtype == torch.float32
        model.to(torch.float32)
        labels = inputs["input_ids"].clone()
        labels[:, :-1] = -100
        model(**inputs, labels=labels).loss.backward()
        kept = kept_by(handle)
    assert all(weight.grad is None for weight in clip.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, clip.parameters(), strict=True))
    seen = Seeing(keep_ratio=0.4)
    with vltok.apply(model, seen, processor=family.processor(), text_tower=text_tower):
        model(**inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs)
    plain, mixed = seen.seen
    assert torch.equal(plain.clip_text, mixed.clip_text)
    assert mixed.clip_image.dtype == torch.float32
    assert kept[0][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_may_have_a_text_tower_of_any(dtype):
    family = tiny.LLAVA
    model, inputs = family.model(dtype=dtype), single(family, "text around")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    relevance = []
    for clip in (clip_model(), clip_model().to(dtype)):
        seen = Seeing(keep_ratio=0.4)
        with vltok.apply(model, seen, processor=family.processor(), text_tower=(clip, clip_tokenizer())):
            model(**inputs)
        (visual,) = seen.seen
        assert visual.clip_image.dtype == visual.clip_text.dtype == torch.float32
        relevance.append(clip_relevance(visual.clip_image, visual.clip_text))
    torch.testing.assert_close(*relevance, rtol=0, atol=0.03)


def test_copies_share_the_text_tower_and_pickles_leave_it_out(text_tower, texts, monkeypatch):
    family = tiny.LLAVA

    def refuse(self, memo):
        raise RuntimeError("the text tower was copied")

    monkeypatch.setattr(type(text_tower[0]), "__deepcopy__", refuse, raising=False)
    model, inputs = family.model(), single(family, "text around")
    with vltok.apply(model, METHOD, processor=family.processor(), text_tower=text_tower) as handle:
        stored = pickle.dumps(handle.host)  # before transformers puts hooks on it that can't be pickled
        expected = model(**inputs).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, expected)
        assert len(texts) == 2
    assert b"text_projection" not in stored
    restored = pickle.loads(stored)
    with pytest.raises(ValueError, match="needs a CLIP model and its tokenizer"):
        restored(**inputs)


def test_threads_ask_their_own_questions(text_tower):
    family = tiny.LLAVA
    model, inputs = shared_model(family), single(family, "text around")
    with vltok.apply(model, METHOD, processor=family.processor(), text_tower=text_tower) as handle:
        expected = {}
        for word in ("w9", "w12"):
            with handle.using(text=word):
                model(**inputs)
                expected[word] = kept_by(handle)
        found: dict[str, list] = {}

        def ask(word: str) -> None:
            with handle.using(text=word):
                for _ in range(4):
                    model(**inputs)
                    found.setdefault(word, []).append(kept_by(handle))

        threads = [threading.Thread(target=ask, args=(word,)) for word in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert expected["w9"] != expected["w12"]
    assert found == {word: [kept] * 4 for word, kept in expected.items()}


def test_a_saved_folder_has_no_text_tower_and_asks_for_one(text_tower, tmp_path):
    family = tiny.LLAVA
    model, inputs, processor = shared_model(family), single(family, "text around"), family.processor()
    with vltok.apply(model, METHOD, processor=processor, text_tower=text_tower) as handle:
        model(**inputs)
        expected = kept_by(handle)
        vltok.save(handle, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vltok_config.json"]
    with pytest.raises(CheckpointError, match=r"vltok\.load\(\) takes text_tower="):
        vltok.load(model, tmp_path, processor=processor)
    with vltok.load(model, tmp_path, processor=processor, text_tower=text_tower) as handle:
        model(**inputs)
        assert kept_by(handle) == expected


def test_a_whole_checkpoint_has_none_either(text_tower, tmp_path):
    family = tiny.LLAVA
    model, inputs, processor = family.model(), single(family, "text around"), family.processor()
    with vltok.apply(model, [vltok.TAP(), METHOD], processor=processor, text_tower=text_tower) as handle:
        model(**inputs)
        expected = kept_by(handle)
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="needs a CLIP model and its tokenizer"):
        vltok.from_pretrained(tmp_path, processor=processor)
    handle = vltok.from_pretrained(tmp_path, processor=processor, text_tower=text_tower)
    handle.model(**inputs)
    assert kept_by(handle) == expected


def test_settings_of_a_block_may_turn_to_clip(text_tower):
    model, inputs, processor = shared_model(tiny.LLAVA), single(tiny.LLAVA, "text around"), tiny.LLAVA.processor()
    with vltok.apply(model, METHOD, processor=processor, text_tower=text_tower) as handle:
        model(**inputs)
        expected = kept_by(handle)
    plain = CDPruner(keep_ratio=0.4, theta=0.9)
    handle = vltok.apply(model, plain, processor=processor, text_tower=text_tower)
    with handle, handle.using(relevance="clip"):
        model(**inputs)
        assert kept_by(handle) == expected
    handle = vltok.apply(model, plain, processor=processor)
    with handle, handle.using(relevance="clip"), pytest.raises(ValueError, match="needs a CLIP model and its tokeni"):
        model(**inputs)


def test_words_and_clip_may_be_asked_for_together(text_tower):
    (both,) = shown(tiny.LLAVA, single(tiny.LLAVA, "text around"), text_tower, needs_=("text", "clip"), text="w9 w10")
    assert both.text.shape[1] == 2
    assert both.clip_text is not None
    (words,) = shown(tiny.LLAVA, single(tiny.LLAVA, "text around"), text_tower, needs_=("text",))
    assert words.clip_text is None
    assert words.clip_image is None


# What is refused


def refused(family: TinyFamily, error: type[Exception], message: str, text_tower, processor=True) -> None:
    """Apply must say this, and leave the model as it was."""
    model = shared_model(family)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(error, match=message):
        vltok.apply(model, METHOD, processor=family.processor() if processor else None, text_tower=text_tower)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_what_does_not_fit_is_refused_when_it_is_applied(text_tower):
    clip, tokenizer = text_tower
    llava = tiny.LLAVA
    refused(llava, ValueError, r"needs a CLIP model and its tokenizer: .*text_tower=\(clip_model, clip_tokeni", None)
    refused(llava, ValueError, "needs the processor, whose tokenizer knows", text_tower, processor=False)
    refused(
        llava,
        UnsupportedModelError,
        "this model's has 32 channels, that of the given CLIP model 48",
        (
            clip_model(width=48),
            tokenizer,
        ),
    )
    refused(tiny.LLAVA_SIGLIP, UnsupportedModelError, "this model has a siglip_vision_model tower", text_tower)
    refused(llava, TypeError, r"must be a CLIP model and its tokenizer, .* got CLIPModel", clip)
    refused(llava, UnsupportedModelError, "must begin with a CLIPModel", (shared_model(llava), tokenizer))
    refused(llava, ValueError, f"end of a text at id {END}, .* marks it by 2", (clip, tiny.tokenizer()))
    legacy = clip_model(end=2)
    refused(llava, ValueError, f"end of a text at id {END}, .* marks it by 2", (legacy, tiny.tokenizer()))


def test_a_projector_of_several_layers_is_refused(text_tower):
    model, processor = tiny.LLAVA.model(), tiny.LLAVA.processor()
    methods = [vltok.TokenPacker(scale_factor=2), CDPruner(keep_ratio=0.5, relevance="clip")]
    with pytest.raises(UnsupportedModelError, match=r"reads \d layers of the vision tower side by side"):
        vltok.apply(model, methods, processor=processor, text_tower=text_tower)


def test_a_question_that_is_given_needs_no_processor(text_tower):
    model, inputs = shared_model(tiny.LLAVA), single(tiny.LLAVA, "text around")
    kept = []
    for processor in (None, tiny.LLAVA.processor()):
        method = CDPruner(keep_ratio=0.4, relevance="clip", text="w9 w10")
        with vltok.apply(model, method, processor=processor, text_tower=text_tower) as handle:
            model(**inputs)
            kept.append(kept_by(handle))
    assert kept[0] == kept[1]


def test_embeddings_are_no_text(text_tower):
    family = tiny.LLAVA
    model, inputs = shared_model(family), dict(single(family, "text around"))
    with vltok.apply(model, METHOD, processor=family.processor(), text_tower=text_tower) as handle:
        model(**inputs)
        expected = kept_by(handle)
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        with pytest.raises(UnsupportedInputError, match="can't be told from inputs_embeds; pass input_ids, or say"):
            model(**inputs)
        with handle.using(text="w1 w2 w3 w4"):
            model(**inputs)
            assert kept_by(handle) == expected


def test_a_prompt_without_a_question_is_refused(text_tower):
    family = tiny.LLAVA
    inputs = family.inputs(["<image>"], [tiny.picture(0, family.size)])
    handle = vltok.apply(shared_model(family), METHOD, processor=family.processor(), text_tower=text_tower)
    with handle, pytest.raises(ValueError, match=r"image \[0\] of the batch comes without a word of text"):
        shared_model(family)(**inputs)
