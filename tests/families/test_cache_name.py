"""The KV cache is found whatever it is called: by the word of the installed transformers, and by the old one."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from prompts import CACHE, CACHE_WORDS, generate, single
from transformers import StaticCache
from transformers.masking_utils import create_causal_mask

import vltok
from vltok.engine import names as cache_name
from vltok.errors import UnsupportedInputError

METHOD = vltok.ToDRE(keep_ratio=0.3, depth=0.5, tau=1.0)
WORDS = torch.tensor([[9, 10, 11]])

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


@pytest.fixture(params=CACHE_WORDS)
def word(request) -> str:
    return request.param


@pytest.fixture
def cache(family, model):
    """The cache of a pruned prompt, whose method is still on."""
    with vltok.apply(model, METHOD):
        yield model(**single(family, "two images"), use_cache=True)[CACHE]


def test_models_layers_masks_and_outputs_use_the_same_word(family, model):
    language_model = model.model.language_model
    layer = language_model.layers[0]
    for part in (model, model.model, language_model, layer, layer.self_attn):
        assert cache_name.CACHE in inspect.signature(part.forward).parameters
    assert cache_name.CACHE in inspect.signature(create_causal_mask).parameters
    for part in (model, model.model, language_model):
        output = part(input_ids=WORDS, use_cache=True)
        assert getattr(output, cache_name.CACHE).get_seq_length() == 3


def test_the_cache_of_a_call_is_found_under_every_word_that_transformers_takes(word):
    given = object()
    assert cache_name.cache_in({}) is None
    assert cache_name.cache_in({word: given, "use_cache": True}) is given
    for of_the_installed in (given, None):  # which counts even if it says that there is none
        assert cache_name.cache_in({"past_key_values": object(), CACHE: of_the_installed}) is of_the_installed


def test_a_cache_under_either_word_goes_on(family, model, cache, word):
    # The whole model translates the word before its inner model is called, so the inner one is called here as well.
    expected = model(input_ids=WORDS, **{CACHE: copy.deepcopy(cache)}).logits
    assert torch.equal(model(input_ids=WORDS, **{word: copy.deepcopy(cache)}).logits, expected)
    inner = model.model(input_ids=WORDS, **{word: copy.deepcopy(cache)}).last_hidden_state
    assert torch.equal(model.lm_head(inner), expected)
    mask = torch.ones(1, single(family, "two images").input_ids.shape[1] + WORDS.shape[1], dtype=torch.long)
    turn = {"input_ids": WORDS, "attention_mask": mask}
    first = generate(model, {**turn, word: copy.deepcopy(cache)}, steps=1)
    allowed = expected[0, -1].clone()
    allowed[model.generation_config.suppress_tokens] = -torch.inf
    assert first.item() == allowed.argmax()


def test_what_a_cache_cannot_answer_is_refused_under_either_word(family, model, cache, word):
    inputs = single(family, "two images")
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    for part in (model, model.model):
        with pytest.raises(UnsupportedInputError, match="StaticCache reserves room"):
            part(**inputs, **{word: static})
        with pytest.raises(UnsupportedInputError, match="attention_mask has 5 columns"):
            part(input_ids=WORDS, attention_mask=torch.ones(1, 5), **{word: cache})
    with pytest.raises(UnsupportedInputError, match="through the whole model"):
        model.model.language_model(input_ids=WORDS, **{word: cache})
