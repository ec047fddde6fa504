"""What is decided before the engine: keys of caches, how much an image may count, and requests that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from serving.vllm.serving import NAMES, arguments, golden, request
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import LruKeyReplicatedSenderCache
from vllm.multimodal.encoder_budget import get_mm_max_toks_per_item
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

import vltok.serving.options
from vltok.serving.architectures import ARCHITECTURES
from vltok.serving.vllm import register

register()


def processor(name: str, method: Any, **options: Any) -> Any:
    """The processor of a model, without an engine."""
    given = arguments(name, method, **options)
    return MULTIMODAL_REGISTRY.create_processor(EngineArgs(model=given.pop("model"), **given).create_model_config())


def processed(own: Any, name: str, asked: dict[str, Any], cache: Any = None, **options: Any) -> dict[str, Any]:
    """What a processor makes of a request, with a cache of images or none."""
    given = request(name, asked)
    ids = own.info.get_tokenizer().encode(given["prompt"])
    items = own.info.parse_mm_data(given["multi_modal_data"])
    inputs = ProcessorInputs(ids, items, hf_processor_mm_kwargs=options, cache=cache)
    return own.apply(inputs, TimingContext(enabled=False))


def hashes(name: str, method: Any, **options: Any) -> list[str]:
    """The keys under which caches have the images of a request."""
    return processed(processor(name, method), name, golden(name)["long"][0], **options)["mm_hashes"]["image"]


def test_keys_of_caches_tell_methods_budgets_and_versions_apart(monkeypatch):
    name = NAMES[0]
    more = {"method": "divprune", "keep_ratio": 0.25, "max_keep_ratio": 1.0}
    keys = [
        hashes(name, None),
        hashes(name, "divprune,keep_ratio=0.25"),
        hashes(name, "divprune,keep_ratio=0.2"),
        hashes(name, "divprune,num_keep=4"),
        hashes(name, "divprune,keep_ratio=0.25,positions=reindex"),
        hashes(name, "stride,keep_ratio=0.25"),
        hashes(name, more, visual_keep_ratio=0.5),
        hashes(name, more, visual_num_keep=4),
    ]
    assert hashes(name, more) == hashes(name, "divprune,keep_ratio=0.25")  # the largest budget changes no image
    monkeypatch.setattr(vltok.serving.options, "__version__", "0.0.1")
    keys.append(hashes(name, "divprune,keep_ratio=0.25"))
    assert len({key for (key,) in keys}) == len(keys)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_budget_of_a_request_counts_in_the_budget_of_the_encoder(name):
    def most(method: Any) -> tuple[int, int]:
        own = processor(name, method)
        places = own.get_dummy_mm_inputs({"image": 1})["mm_placeholders"]["image"]
        counted = get_mm_max_toks_per_item(own, {"image": 1}, None)["image"]
        return counted, sum(place.get_num_embeds() for place in places)

    whole, measured = most(None)
    assert whole == measured
    assert most("divprune,keep_ratio=0.25") == (round(0.25 * whole),) * 2
    assert most({"method": "divprune", "keep_ratio": 0.25, "max_keep_ratio": 0.5}) == (round(0.5 * whole),) * 2
    assert most({"method": "divprune", "num_keep": 1, "max_num_keep": 3}) == (3, 3)
    on_grid = "pool,keep_ratio=0.25"  # how many hangs on the grid
    if on_grid in golden(name)["results"]:
        counted, measured = most(on_grid)
        assert whole > measured and whole >= counted >= measured


BAD = [
    {"visual_keep_ratio": 0.0},
    {"visual_keep_ratio": -0.5},
    {"visual_keep_ratio": 1.5},
    {"visual_keep_ratio": float("nan")},
    {"visual_keep_ratio": "half"},
    {"visual_keep_ratio": 0.6},
    {"visual_num_keep": 0},
    {"visual_num_keep": 2.5},
    {"visual_num_keep": 1000},
    {"visual_keep_ratio": 0.1, "visual_num_keep": 2},
]


@pytest.mark.parametrize("options", BAD, ids=repr)
def test_a_budget_that_is_wrong_or_above_the_largest_is_refused_before_the_engine(options):
    name = NAMES[0]
    own = processor(name, {"method": "divprune", "keep_ratio": 0.25, "max_keep_ratio": 0.5})
    with pytest.raises((ValueError, TypeError), match=r"keep_ratio|num_keep"):
        processed(own, name, golden(name)["long"][0], **options)


def test_a_budget_is_refused_where_nothing_is_pruned():
    name = NAMES[0]
    with pytest.raises(ValueError, match="prunes nothing; start it with vltok_pruning"):
        processed(processor(name, None), name, golden(name)["long"][0], visual_keep_ratio=0.5)


@pytest.mark.parametrize("name", [name for name in NAMES if not ARCHITECTURES[golden(name)["kind"]].has_axes])
def test_positions_that_the_decoder_does_not_reach_are_refused_before_the_engine(name):
    long = golden(name)["long"]
    one, two = (next(each for each in long if len(each["images"]) == count) for count in (1, 2))
    method = "divprune,num_keep=1"
    place = processed(processor(name, method), name, one)["mm_placeholders"]["image"][0]
    whole = processed(processor(name, None), name, one)["mm_placeholders"]["image"][0].length
    ahead = whole - place.length
    limit = {"max_model_len": 4 * (reach := 8 * ahead) - ahead}
    short = {"hf_overrides": {"text_config": {"max_position_embeddings": reach}}}
    own = processor(name, method, **short, **limit)
    assert len(processed(own, name, one)["prompt_token_ids"]) > 0
    cache = LruKeyReplicatedSenderCache(own.info.ctx.model_config)
    for _ in range(2):  # the second time all images are in the cache
        with pytest.raises(ValueError, match=rf"positions for {4 * reach}; ask about fewer images"):
            processed(own, name, two, cache)
    free = processor(name, f"{method},positions=reindex", **short, **limit)
    assert len(processed(free, name, two)["prompt_token_ids"]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_may_end_with_an_image_where_positions_have_one_axis(name):
    own = processor(name, "divprune,num_keep=2")
    config, asked = own.info.get_hf_config(), request(name, golden(name)["long"][-1])
    mark = getattr(config, "image_token_id", None) or config.image_token_index
    ids = own.info.get_tokenizer().encode(asked["prompt"])
    ids = ids[: len(ids) - ids[::-1].index(mark)]
    inputs = ProcessorInputs(ids, own.info.parse_mm_data(asked["multi_modal_data"]))
    if ARCHITECTURES[golden(name)["kind"]].has_axes:
        with pytest.raises(ValueError, match="ends with an image or video; put a word or a mark behind it"):
            own.apply(inputs, TimingContext(enabled=False))
    else:
        written = own.apply(inputs, TimingContext(enabled=False))["prompt_token_ids"]
        assert mark in written[-2:]  # some models have a word of their own behind an image
