"""What a selector is shown besides embeddings, and what becomes of kept tokens that it changes, on every family."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import oracle
import pytest
import tiny
import torch
import zoo
from prompts import BATCH, batch, generate, single
from reference import assert_close
from tiny import TinyFamily, shared_model
from versions import orders_repeated_images

import vltok
from vltok.engine.question import turn_of
from vltok.errors import UnsupportedInputError, UnsupportedModelError
from vltok.families import view
from vltok.methods.pruning.floors import select_stride
from vltok.methods.pruning.question import TextSelector
from vltok.tokens import gather_tokens
from vltok.visual import AttentionRequest, Need, Selection, VisualTokens

FAMILIES = list({family.key: family for family in [*tiny.ALL, *zoo.ROWS]}.values())
SHOWING = [family for family in FAMILIES if family.shows_patches]
every = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
showing = pytest.mark.parametrize("family", SHOWING, ids=lambda family: family.key)
TEMPLATE = (
    "{% for m in messages %}{{ 'w31 ' if m.role == 'user' else 'w32 ' }}"
    "{% for c in m.content %}{{ c.text }}{% endfor %} w33 {% endfor %}{% if add_generation_prompt %}w32 {% endif %}"
)


@dataclass(frozen=True)
class Changing(vltok.Selector):
    """Keeps tokens at even distances, and puts `factor` times what they are in their places."""

    factor: float = 1.0
    features: bool = False
    seen: list[VisualTokens] = field(default_factory=list, compare=False)

    merges = True

    @property
    def needs(self) -> tuple[Need, ...]:
        return ("features", "keys") if self.features else ()

    def attention_request(self, has_cls: bool) -> AttentionRequest | None:
        return AttentionRequest("received", -2) if self.features else None

    def select(self, visual: VisualTokens, num_keep: int) -> Selection:
        self.seen.append(visual)
        count, length, _ = visual.embeddings.shape
        indices = select_stride(length, num_keep, visual.embeddings.device).expand(count, -1)
        if self.features and visual.can_project:
            return Selection(indices, features=self.factor * gather_tokens(visual.features, indices))
        return Selection(indices, self.factor * gather_tokens(visual.embeddings, indices))


STRIDE = vltok.StrideTokens(keep_ratio=0.4)


@every
def test_what_stands_in_the_place_of_kept_tokens_enters_the_language_model(family: TinyFamily):
    """Compare with the unpruned model, given the changed tokens, the others hidden."""
    model, inputs = shared_model(family, "eager"), batch(family, names=["text around", "two images"])
    decoder, visual = oracle.decoder_of(model, family), oracle.placeholders(model, inputs)
    with vltok.apply(model, STRIDE) as handle:
        plain = model(**inputs).logits
        gone = oracle.dropped(handle.report(file=None), visual)
    with vltok.apply(model, Changing(keep_ratio=0.4)):
        assert torch.equal(model(**inputs).logits, plain)
    with vltok.apply(model, Changing(keep_ratio=0.4, factor=-3.0)):
        changed = model(**inputs).logits
    if oracle.is_recurrent(decoder):
        pytest.skip("layers with a state can't be told to forget a token")
    kept = (visual & ~gone).unsqueeze(-1)

    def change(module, args, kwargs):
        return args, {**kwargs, "inputs_embeds": torch.where(kept, -3.0, 1.0) * kwargs["inputs_embeds"]}

    hook = decoder.register_forward_pre_hook(change, with_kwargs=True)
    try:
        with oracle.hidden(decoder, gone):
            expected = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    seen = inputs["attention_mask"].bool() & ~gone
    assert_close(changed[seen], expected[seen])
    assert not torch.allclose(changed[:, -1], plain[:, -1], atol=1e-3)


@showing
def test_features_are_what_the_projector_makes_tokens_of(family: TinyFamily):
    model, inputs = shared_model(family), batch(family, names=["text around", "two images"])
    with vltok.apply(model, STRIDE):
        plain = model(**inputs).logits
    method = Changing(keep_ratio=0.4, features=True)
    with vltok.apply(model, method):
        assert_close(model(**inputs).logits, plain)
    for visual in method.seen:
        assert visual.features.shape[:2] == visual.keys.shape[:2] == visual.embeddings.shape[:2]
        assert visual.keys.shape[-1] % visual.num_heads == 0
        assert visual.features.isfinite().all() and visual.keys.isfinite().all()
        has_patch = visual.attention > -torch.inf
        assert torch.equal(has_patch, visual.features.abs().amax(-1) > 0)
        assert torch.equal(has_patch, visual.keys.abs().amax(-1) > 0)


@showing
def test_features_and_keys_of_a_row_do_not_depend_on_the_batch(family: TinyFamily):
    model = shared_model(family)

    def shown(inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
        method = Changing(keep_ratio=0.4, features=True)
        with vltok.apply(model, method):
            model(**inputs)
        pairs = [(key, visual) for visual in method.seen for key in visual.image_keys.tolist()]
        return {
            key: (visual.features[visual.image_keys == key], visual.keys[visual.image_keys == key])
            for key, visual in pairs
        }

    alone = {**shown(single(family, "text around")), **shown(single(family, "two images"))}
    together = shown(batch(family, names=["text around", "two images"]))
    assert together.keys() == alone.keys()
    for key, parts in together.items():
        for part, own in zip(parts, alone[key], strict=True):
            torch.testing.assert_close(part, own, rtol=1e-4, atol=1e-4)


def far_apart(features: torch.Tensor, num_keep: int) -> list[int]:
    """Greedy picks of one image, (N, C): each channel of its patches standardised, distances times distinctness."""
    patches = [i for i, token in enumerate(features) if token.abs().max() > 0]
    scaled = features[patches].double()
    scaled = scaled[:, scaled.std(0) > 0]
    scaled = scaled / scaled.std(0, correction=0)
    mean = scaled.mean(0)
    weight = [float(1 - torch.cosine_similarity(token, mean, dim=0)) for token in scaled]
    rest = torch.nn.functional.normalize(scaled - mean, dim=1)
    far, count = 1 - rest @ rest.T, range(len(patches))
    picks = [max(count, key=lambda i: weight[i] * min(far[i, j] for j in count if j != i))]
    while len(picks) < num_keep:
        left = [i for i in count if i not in picks]
        picks.append(max(left, key=lambda i: weight[i] * min(far[i, j] for j in picks)))
    return sorted(patches[i] for i in picks)


@showing
def test_standardised_features_of_patches_decide(family: TinyFamily):
    model, inputs = shared_model(family), batch(family, names=["text around", "two images"])
    watching, correcting = (
        Changing(keep_ratio=0.4, features=True),
        vltok.DivPrune(num_keep=3, correction="standardised"),
    )
    with vltok.apply(model, watching):
        model(**inputs)
    expected = [far_apart(features, 3) for visual in watching.seen for features in visual.features]
    with vltok.apply(model, correcting) as handle:
        model(**inputs)
        kept = [each.tolist() for images in handle.report(file=None).keep_indices for each in images]
    assert sorted(kept) == sorted(expected)


@pytest.mark.parametrize("family", [each for each in FAMILIES if not each.shows_patches], ids=lambda each: each.key)
def test_families_whose_features_are_not_known_refuse_what_needs_them(family: TinyFamily):
    model = shared_model(family)
    title = view(model).family.title
    with pytest.raises(UnsupportedModelError, match=f"the visual tokens of {title} stand for"):
        vltok.apply(model, vltok.DivPrune(keep_ratio=0.4, correction="standardised"))
    inputs = single(family, "text around")
    with vltok.apply(model, vltok.DivPrune(keep_ratio=0.4)) as handle:
        with pytest.raises(UnsupportedModelError, match="stand for"), handle.using(correction="standardised"):
            model(**inputs)
        model(**inputs)


@showing
def test_gradients_reach_the_tower_through_features(family: TinyFamily):
    model = family.model()
    with vltok.apply(model, Changing(keep_ratio=0.4, features=True, factor=2.0)):
        model(**single(family, "text around")).logits.square().mean().backward()
    weights = [weight for tower in view(model).family.towers(model.model) for weight in tower.parameters()]
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights)


@dataclass(frozen=True)
class Reading(TextSelector):
    """Keeps what is most like the mean word of the question."""

    seen: list[VisualTokens] = field(default_factory=list, compare=False)

    def select(self, visual: VisualTokens, num_keep: int) -> torch.Tensor:
        self.seen.append(visual)
        word = (visual.text * visual.text_mask.unsqueeze(-1)).sum(1, keepdim=True)
        scores = (visual.embeddings * word).sum(-1)
        return scores.argsort(dim=1, descending=True, stable=True)[:, :num_keep].sort(dim=1).values


def words_of(family: TinyFamily, text: str) -> torch.Tensor:
    """The embeddings of some words."""
    ids = family.processor().tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return shared_model(family).get_input_embeddings()(ids)[0]


def asked(family: TinyFamily, inputs, processor=None, **knobs) -> list[torch.Tensor]:
    """The words that each image was asked about, (M, D) each."""
    method = Reading(keep_ratio=0.4, **knobs)
    model = shared_model(family)
    with vltok.apply(model, method, processor=processor):
        model(**inputs)
    return [text[mask] for visual in method.seen for text, mask in zip(visual.text, visual.text_mask, strict=True)]


def has(text: torch.Tensor, words: torch.Tensor) -> bool:
    """Whether some words are among those of a text, one behind another."""
    windows = (
        text.unfold(0, len(words), 1).transpose(1, 2) if len(text) >= len(words) else text.new_zeros(0, *words.shape)
    )
    return bool((windows - words).abs().amax((1, 2)).lt(1e-6).any()) if len(windows) else False


@every
def test_the_question_is_what_the_prompt_says(family: TinyFamily):
    one, other = words_of(family, "w3 w4"), words_of(family, "w5 w6")
    texts = asked(family, batch(family, names=["text around", "image first"]))
    found = [(has(text, one), has(text, other)) for text in texts]
    assert set(found) == {(True, False), (False, True)}


@every
def test_a_template_tells_the_last_turn(family: TinyFamily):
    processor = family.processor()
    processor.chat_template = TEMPLATE
    assert turn_of(processor) is not None
    inputs = family.inputs(["w31 w1 w33 w32 w2 w33 w31 w7 <image> w8 w33 w32"], [tiny.picture(3, family.size)])
    for words in asked(family, inputs, processor):
        assert has(words, words_of(family, "w7")) and has(words, words_of(family, "w8"))
        assert not any(has(words, words_of(family, word)) for word in ("w1", "w2", "w31", "w32", "w33"))


@every
def test_the_caller_may_say_the_question(family: TinyFamily):
    inputs, processor = single(family, "text around"), family.processor()
    for words in asked(family, inputs, processor, text="w9 w10"):
        assert torch.equal(words, words_of(family, "w9 w10"))
    with pytest.raises(UnsupportedInputError, match=r"text= needs the processor"):
        asked(family, inputs, text="w9 w10")


@every
def test_answers_are_no_question(family: TinyFamily):
    """Neither those that training looks at, nor what is being generated."""
    inputs = single(family, "text around")
    labels = inputs["input_ids"].clone()
    labels[:, :-1] = -100
    whole = asked(family, inputs)
    taught = asked(family, {**inputs, "labels": labels})
    assert all(
        len(own) == len(each) - 1 and torch.equal(own, each[:-1]) for own, each in zip(taught, whole, strict=True)
    )


@every
def test_picks_for_a_question_stay_while_the_answer_grows(family: TinyFamily):
    model, inputs = shared_model(family), batch(family)
    method = Reading(keep_ratio=0.4)
    with vltok.apply(model, method):
        cached = generate(model, inputs)
        count = len(method.seen)
        assert torch.equal(generate(model, inputs, use_cache=False), cached)
        assert len(method.seen) == 2 * count  # asked once more, and not with every word


@orders_repeated_images
@every
def test_picks_for_a_question_stay_while_beams_grow(family: TinyFamily):
    model, inputs = shared_model(family), batch(family, names=["text around", "image first"])
    with vltok.apply(model, Reading(keep_ratio=0.4)):
        beams = generate(model, inputs, num_beams=2)
        assert torch.equal(generate(model, inputs, num_beams=2, use_cache=False), beams)


@every
def test_picks_for_a_question_do_not_depend_on_the_batch(family: TinyFamily):
    model = shared_model(family)
    with vltok.apply(model, Reading(keep_ratio=0.4)) as handle:
        model(**batch(family))
        together = handle.report(file=None).keep_indices
        for name, own in zip(BATCH, together, strict=True):
            model(**single(family, name))
            alone = handle.report(file=None)
            kept = alone.keep_indices[0] if alone.images else []
            assert [each.tolist() for each in kept] == [each.tolist() for each in own]


def test_threads_ask_their_own_questions():
    family = tiny.LLAVA
    model, inputs, processor = shared_model(family), single(family, "text around"), family.processor()
    with vltok.apply(model, Reading(keep_ratio=0.4), processor=processor) as handle:
        expected = {}
        for word in ("w9", "w12"):
            with handle.using(text=word):
                model(**inputs)
                expected[word] = handle.report(file=None).keep_indices[0][0].tolist()
        assert expected["w9"] != expected["w12"]
        found: dict[str, list[int]] = {}

        def ask(word: str) -> None:
            with handle.using(text=word):
                for _ in range(5):
                    model(**inputs)
                    found.setdefault(word, []).append(handle.report(file=None).keep_indices[0][0].tolist())

        threads = [threading.Thread(target=ask, args=(word,)) for word in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {word: [picks] * 5 for word, picks in expected.items()}


def test_selections_that_can_not_be_carried_out_are_refused():
    model, inputs = shared_model(tiny.QWEN2_5_VL), single(tiny.QWEN2_5_VL, "text around")

    class Wrong(Changing):
        def select(self, visual, num_keep):
            return Selection(
                torch.arange(num_keep).expand(len(visual.embeddings), -1), features=visual.features[:, :num_keep]
            )

    with vltok.apply(model, Wrong(keep_ratio=0.4, features=True)), pytest.raises(ValueError, match="give embeddings"):
        model(**inputs)

    class Thin(Changing):
        def select(self, visual, num_keep):
            selection = super().select(visual, num_keep)
            return replace(selection, embeddings=selection.embeddings[..., :1])

    class Silent(Changing):
        merges = False

    class Short(vltok.StrideTokens):
        def select(self, visual, num_keep):
            return super().select(visual, num_keep).int()

    for selector, message in ((Thin, "embeddings of shape"), (Silent, "let `merges` be True"), (Short, "int64, got")):
        with vltok.apply(model, selector(keep_ratio=0.4)), pytest.raises(ValueError, match=message):
            model(**inputs)
    with pytest.raises(ValueError, match="text must be a question"):
        replace(Reading(keep_ratio=0.5), text=" ")


def test_any_selector_may_need_the_words_of_the_question():
    model, inputs = shared_model(tiny.QWEN2_5_VL), single(tiny.QWEN2_5_VL, "text around")
    seen: dict[str, torch.Tensor] = {}

    class Plain(vltok.StrideTokens):
        needs = ("text",)

        def select(self, visual, num_keep):
            seen["plain"] = visual.text
            return super().select(visual, num_keep)

    class Asking(TextSelector):
        def select(self, visual, num_keep):
            seen["asking"] = visual.text
            return select_stride(visual.embeddings.shape[1], num_keep).repeat(len(visual.embeddings), 1)

    for selector in (Plain, Asking):
        with vltok.apply(model, selector(keep_ratio=0.4)):
            model(**inputs)
    assert seen["plain"].shape[1] > 0 and torch.equal(seen["plain"], seen["asking"])


@every
def test_merged_tokens_are_means(family: TinyFamily):
    """Compare with a selector that puts the means there, made one by one."""

    class Naive(Changing):
        def select(self, visual, num_keep):
            selection = super().select(visual, num_keep)
            means = []
            for tokens, kept in zip(visual.embeddings, selection.indices.tolist(), strict=True):
                own = {place: [tokens[place]] for place in kept}
                for place, token in enumerate(tokens):
                    if place not in own:
                        cosines = [torch.cosine_similarity(token.float(), tokens[each].float(), dim=0) for each in kept]
                        own[kept[int(torch.stack(cosines).argmax())]].append(token)
                means.append(torch.stack([torch.stack(each).mean(0) for each in own.values()]))
            return Selection(selection.indices, torch.stack(means))

    model, inputs = shared_model(family), batch(family, names=["text around", "two images"])
    with vltok.apply(model, Naive(keep_ratio=0.4)):
        expected = model(**inputs).logits
    with vltok.apply(model, replace(STRIDE, merge="nearest")):
        assert_close(model(**inputs).logits, expected)


def spread(model, inputs, gone: torch.Tensor) -> torch.Tensor:
    """Positions, (B, T), as `positions="stretch"` makes them, token by token."""
    visual = oracle.placeholders(model, inputs)
    positions = inputs["attention_mask"].cumsum(1) - 1
    for row, is_visual in enumerate(visual.tolist()):
        begin = 0
        while begin < len(is_visual):
            end = begin
            while end < len(is_visual) and is_visual[end] == is_visual[begin]:
                end += 1
            kept = [place for place in range(begin, end) if is_visual[begin] and not gone[row, place]]
            old = positions[row].clone()
            for number, place in enumerate(kept):
                positions[row, place] = old[begin + number * (end - 1 - begin) // max(1, len(kept) - 1)]
            begin = end
    return positions


def test_stretched_positions_reach_over_the_run():
    family = tiny.LLAVA
    model, inputs = shared_model(family, "eager"), batch(family, names=["text around", "two images"])
    with vltok.apply(model, replace(STRIDE, positions="stretch")) as handle:
        actual = model(**inputs).logits
        gone = oracle.dropped(handle.report(file=None), oracle.placeholders(model, inputs))
        words = generate(model, inputs)
        assert torch.equal(generate(model, inputs, use_cache=False), words)
    positions = spread(model, inputs, gone)
    assert not torch.equal(positions, inputs["attention_mask"].cumsum(1) - 1)
    with oracle.hidden(oracle.decoder_of(model, family), gone):
        expected = model(**inputs, position_ids=positions.clamp_min(0), use_cache=False).logits
    seen = inputs["attention_mask"].bool() & ~gone
    assert_close(actual[seen], expected[seen])
    with pytest.raises(ValueError, match="positions on several axes"):
        vltok.apply(shared_model(tiny.QWEN2_5_VL), replace(STRIDE, positions="stretch"))


def test_positions_that_are_none_are_refused():
    model, inputs = shared_model(tiny.LLAVA), single(tiny.LLAVA, "text around")
    for wrong in (lambda k: [0] * k, lambda k: range(k - 1), lambda k: range(-1, k - 1), lambda k: range(k, 0, -1)):

        class Wrong(vltok.Selector):
            def select(self, visual, num_keep, wrong=wrong):
                return torch.tensor([list(wrong(num_keep))] * len(visual.embeddings))

        with (
            vltok.apply(model, Wrong(keep_ratio=0.4)),
            pytest.raises(ValueError, match="must return ascending positions"),
        ):
            model(**inputs)
