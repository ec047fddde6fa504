"""What can't be served is refused before a model is loaded, with the way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from serving.vllm.serving import BOTH, arguments
from transformers import PretrainedConfig
from vllm.engine.arg_utils import EngineArgs

from vltok.errors import UnsupportedModelError
from vltok.serving.architectures import ARCHITECTURES
from vltok.serving.vllm import config as checks
from vltok.serving.vllm import register

register()
ONE_AXIS, AXES = BOTH


def start(name: str, method: Any, **options: Any) -> Any:
    """As much of a start as happens before a model is loaded."""
    given = arguments(name, method, **options)
    return EngineArgs(model=given.pop("model"), **given).create_model_config()


WRONG = [
    ("todre,keep_ratio=0.25", "give relevance=False"),
    ("fastv,keep_ratio=0.5", "choose a selector, such as divprune"),
    ("cdpruner,keep_ratio=0.25", "reads the question and can't be served"),
    ("tokenpacker", "choose a selector"),
    ("nothing,keep_ratio=0.5", "nothing"),
    ("divprune,keep_ratio=1.5", "keep_ratio"),
    ("divprune", "keep_ratio"),
    ({"method": "divprune", "keep_ratio": 0.25, "share": 0.5}, "share"),
    ({"method": "divprune", "keep_ratio": 0.25, "max_keep_ratio": 0.1}, "max_keep_ratio"),
    ({"method": "divprune", "num_keep": 4, "max_num_keep": 2}, "max_num_keep"),
    ({"method": "divprune", "keep_ratio": 0.25, "max_keep_ratio": 0.5, "max_num_keep": 8}, "one of"),
    ({"keep_ratio": 0.25}, "must be a method as text"),
]


@pytest.mark.parametrize(("method", "message"), WRONG, ids=[repr(method) for method, _ in WRONG])
def test_a_method_that_can_not_be_served_is_refused_with_the_way_out(method, message):
    with pytest.raises(Exception, match=message):
        start(ONE_AXIS, method)


def test_a_checkpoint_with_a_method_on_the_model_is_refused():
    with pytest.raises(ValueError, match=r"remove the method, and save it\s+again"):
        start(ONE_AXIS, "divprune,keep_ratio=0.25", hf_overrides={"vltok": {"method": "soft"}})


def test_positions_on_several_axes_are_not_counted_anew():
    with pytest.raises(ValueError, match='use "keep"'):
        start(AXES, "divprune,keep_ratio=0.25,positions=reindex")


def test_sliding_windows_are_counted_anew_or_not_at_all():
    sliding = {"hf_overrides": {"text_config": {"sliding_window": 64}}}
    with pytest.raises(ValueError, match='use positions="reindex"'):
        start(ONE_AXIS, "divprune,keep_ratio=0.25", **sliding)
    assert start(ONE_AXIS, "divprune,keep_ratio=0.25,positions=reindex", **sliding) is not None


def test_angles_that_hang_on_how_far_positions_reach_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match='use positions="reindex"'):
        start(ONE_AXIS, "divprune,keep_ratio=0.25", hf_overrides={"text_config": {"rope_parameters": rope}})


def test_the_decoder_reaches_further_and_answers_may_not_be_longer():
    pruned, plain = start(ONE_AXIS, "divprune,keep_ratio=0.25", max_model_len=None), start(ONE_AXIS, None)
    usual = plain.hf_text_config.max_position_embeddings
    assert (pruned.max_model_len, pruned.hf_text_config.max_position_embeddings) == (usual, checks.REACH * usual)


def test_budgets_of_requests_are_not_options_of_the_server():
    with pytest.raises(ValueError, match="stands in vltok_pruning"):
        start(ONE_AXIS, "divprune,keep_ratio=0.25", mm_processor_kwargs={"visual_keep_ratio": 0.5})


def on_ranks(method: str, ranks: int) -> SimpleNamespace:
    """What vLLM asks `PrunedConfig` about, as far as it is looked at."""
    model = SimpleNamespace(hf_config=PretrainedConfig(vltok_pruning=method))
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=ranks))


def test_methods_that_read_the_tower_are_refused_where_its_heads_are_spread():
    with pytest.raises(UnsupportedModelError, match="serve with one, or choose a method that needs none"):
        checks.PrunedConfig.verify_and_update_config(on_ranks("fastervlm,keep_ratio=0.25", 2))
    checks.PrunedConfig.verify_and_update_config(on_ranks("fastervlm,keep_ratio=0.25", 1))
    checks.PrunedConfig.verify_and_update_config(on_ranks("divprune,keep_ratio=0.25", 2))


def test_every_architecture_is_known_by_its_own_name_alone():
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    assert {own.name for own in ARCHITECTURES.values()} <= {*known}
    register()
    assert ModelRegistry.get_supported_archs() == known


def test_the_installed_version_is_one_of_those_tested():
    import vllm

    assert vllm.__version__ in checks.TESTED, "run these tests with this version, then name it in TESTED"


def test_another_version_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(checks, "TESTED", ("0.1.0",))
    start(ONE_AXIS, None)
    assert "tested with" not in caplog.text
    start(ONE_AXIS, "divprune,keep_ratio=0.25")
    assert "tested with vLLM 0.1.0" in caplog.text
