"""Whatever a file from outside holds, it is read rightly or refused with CheckpointError: JSON, and weights."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import LLAVA, picture

import vltok
from vltok.errors import CheckpointError
from vltok.files import find_model, open_weights, read_json, read_weights

METHODS = {
    method.name: method
    for method in (
        *(vltok.ToDRE(keep_ratio=0.5), vltok.DivPrune(keep_ratio=0.5), vltok.FasterVLM(num_keep=3)),
        *(vltok.RandomTokens(num_keep=3), vltok.StrideTokens(num_keep=2)),
        *(vltok.TokenPacker(2), vltok.SOFT(ratio=2), vltok.TAP(num_scales=3), vltok.ADL()),
    )
}
HEAD = '{"vltok_version": "0", "family": "llava", "methods": [%s]}'
# Sizes stay small: a projector of a million columns would be made before its weights are found to be missing.
PLAIN = st.one_of(
    *(st.none(), st.booleans(), st.integers(-40, 40), st.integers().filter(lambda n: abs(n) >= 2**64)),
    *(st.floats(), st.text(max_size=5)),
)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
many = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return LLAVA.model()


@pytest.fixture(scope="module")
def processor() -> Any:
    return LLAVA.processor()


def load(model: torch.nn.Module, folder: Path, processor: Any) -> None:
    """Load and remove; CheckpointError is the only error allowed."""
    try:
        vltok.load(model, folder, processor=processor).remove()
    except CheckpointError as error:
        str(error).encode("utf-8", "backslashreplace")


# Settings


@pytest.mark.parametrize("name", METHODS)
def test_any_value_of_any_setting_is_taken_or_refused(model, processor, tmp_path, name):
    with vltok.apply(model, METHODS[name], processor=processor) as handle:
        vltok.save(handle, tmp_path)
    path = tmp_path / "vltok_config.json"
    saved = json.loads(path.read_text())
    method = saved["methods"][0]

    @many
    @given(st.sampled_from([*method, "other"]), VALUES)
    def check(field: str, value: Any) -> None:
        path.write_text(json.dumps({**saved, "methods": [{**method, field: value}]}))
        load(model, tmp_path, processor)

    check()


@many
@given(VALUES)
@example([])
@example({"method": ["todre"], "version": 1})
def test_any_value_in_the_place_of_a_part_is_refused(model, processor, tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("saved")
    whole = {"vltok_version": "0", "family": "llava", "methods": [METHODS["stride"].to_dict()]}
    for changed in (value, *({**whole, field: value} for field in whole), {**whole, "methods": [value]}):
        (folder / "vltok_config.json").write_text(json.dumps(changed))
        load(model, folder, processor)


@many
@given(st.binary(max_size=40), st.integers(0, 200))
def test_any_bytes_in_the_file_are_refused(model, processor, tmp_path_factory, noise, place):
    folder = tmp_path_factory.mktemp("saved")
    right = (HEAD % json.dumps(METHODS["todre"].to_dict())).encode()
    for content in (noise, right[:place] + noise + right[place + len(noise) :], right[:place]):
        (folder / "vltok_config.json").write_bytes(content)
        load(model, folder, processor)


DAMAGED = {
    "nested deeply": ("[" * 200_000, "not a JSON file"),
    "nested": (HEAD % ('{"method": ' + "[" * 60 + "]" * 60 + "}"), "levels deep"),
    "an integer of 5000 digits": (HEAD % f'{{"method": "stride", "version": 1, "num_keep": {"9" * 5000}}}', "digits"),
    "an integer of 70 bits": (HEAD % f'{{"method": "stride", "version": 1, "num_keep": {2**69}}}', "70 bits"),
    "NaN": (HEAD % '{"method": "stride", "version": 1, "keep_ratio": NaN}', "nan"),
    "a number that overflows": (HEAD % '{"method": "adl", "version": 1, "weight": 1e999}', "inf"),
    "a field that comes twice": (HEAD % '{"method": "stride", "method": "todre", "version": 1}', "twice: 'method'"),
    "a flag as a version": (HEAD % '{"method": "stride", "version": true, "num_keep": 3}', "format"),
    "a word as a flag": (
        HEAD % '{"method": "soft", "version": 1, "normalize": "no"}',
        "normalize of soft must be bool",
    ),
    "a share out of range": (HEAD % '{"method": "stride", "version": 1, "keep_ratio": 7}', r"in \(0, 1\], got 7"),
    "levels no tower has": (HEAD % '{"method": "tokenpacker", "version": 1, "levels": [1, 900]}', "can't take"),
    "a size no memory holds": (HEAD % '{"method": "tap", "version": 1, "num_scales": 1099511627776}', "Storage size"),
    "half a surrogate": (HEAD % '{"method": "\\ud800", "version": 1}', "unknown method"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_settings_file_is_refused_by_name(model, processor, tmp_path, what):
    text, message = DAMAGED[what]
    (tmp_path / "vltok_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        vltok.load(model, tmp_path, processor=processor)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_other_encodings_than_utf_8_are_refused(model, tmp_path, encoding):
    text = HEAD % json.dumps(METHODS["stride"].to_dict())
    (tmp_path / "vltok_config.json").write_text(text, encoding=encoding)
    with pytest.raises(CheckpointError, match="not a JSON file"):
        vltok.load(model, tmp_path)


def test_folders_in_the_place_of_files_are_refused(model, processor, tmp_path):
    with vltok.apply(model, vltok.TokenPacker(2), processor=processor) as handle:
        vltok.save(handle, tmp_path / "saved")
    for name in ("vltok.safetensors", "vltok_config.json"):
        (tmp_path / "saved" / name).unlink()
        (tmp_path / "saved" / name).mkdir()
        with pytest.raises(CheckpointError, match=name):
            vltok.load(model, tmp_path / "saved", processor=processor)


def test_foreign_json_may_hold_what_settings_may_not(tmp_path):
    (tmp_path / "config.json").write_text('{"limit": [0.0, Infinity], "length": 1000000000000000019884624838656}')
    assert read_json(tmp_path / "config.json") == {"limit": [0.0, float("inf")], "length": 10**30 + 19884624838656}


# Models that transformers saved with a method on them


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A model saved with a TokenPacker on it."""
    folder, processor = tmp_path_factory.mktemp("whole"), LLAVA.processor()
    handle = vltok.apply(LLAVA.model(), vltok.TokenPacker(2), processor=processor)
    handle.model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(whole, tmp_path) -> Path:
    """Its files, for a test to change."""
    for path in whole.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def rewrite(folder: Path, content: str | bytes) -> None:
    path = folder / "config.json"
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


RECORDS: dict[str, Any] = {
    "a number": lambda note: 3,
    "nothing": lambda note: None,
    "nothing to restore": lambda note: {name: note[name] for name in note if name != "restore"},
    "a list to restore": lambda note: {**note, "restore": []},
    "a part that is no part": lambda note: {**note, "restore": {**note["restore"], "tower": {}}},
    "methods that are none": lambda note: {**note, "methods": 3},
    "another family": lambda note: {**note, "family": "internvl"},
    "a number that is none": lambda note: {**note, "methods": [{**note["methods"][0], "scale_factor": float("nan")}]},
    **{
        f"{field}={value!r}": lambda note, field=field, value=value: {
            **note,
            "restore": {**note["restore"], "config": {**note["restore"]["config"], field: value}},
        }
        for field, value in (
            *(("__class__", 3), ("to_dict", 3), ("no_such_field", 3), ("projector_hidden_act", 7)),
            *(("projector_hidden_act", "no activation"), ("vision_feature_layer", "x"), ("vision_feature_layer", {})),
            *(("image_seq_length", 10**40), ("text_config", 3)),
        )
    },
    "a processor's field": lambda note: {**note, "restore": {**note["restore"], "processor": {"patch_size": "x"}}},
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_made_up_record_in_a_models_config_is_refused(whole, changed, what):
    config = json.loads((whole / "config.json").read_text())
    rewrite(changed, json.dumps({**config, "vltok": RECORDS[what](copy.deepcopy(config["vltok"]))}))
    with pytest.raises(CheckpointError):
        vltok.from_pretrained(changed)


def test_a_record_that_leaves_a_guard_in_place_is_refused_by_the_name_of_its_field(whole, changed):
    config = json.loads((whole / "config.json").read_text())
    config["vltok"]["restore"]["config"] = {}
    rewrite(changed, json.dumps(config))
    with pytest.raises(CheckpointError, match="doesn't say what projector_hidden_act held"):
        vltok.from_pretrained(changed)


def test_a_damaged_config_of_a_model_is_refused(whole, changed):
    text = (whole / "config.json").read_text()
    for content in ("[" * 100_000, text[:-30], text.encode("utf-16"), text.replace('"vltok"', '"vltok": 3, "vltok"')):
        rewrite(changed, content)
        with pytest.raises(CheckpointError, match=r"config\.json is not a JSON file"):
            vltok.from_pretrained(changed)


# Weights

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


def poisoned(weights: dict[str, torch.Tensor], name: str, kind: Any) -> dict[str, torch.Tensor]:
    """The weights, one of them of another dtype or with a single value that is not finite."""
    tensor = weights[name].clone()
    if isinstance(kind, float):
        tensor.view(-1)[-1] = kind
    return {**weights, name: tensor if isinstance(kind, float) else tensor.to(kind)}


@pytest.mark.parametrize("kind", [*OTHERS, float("nan"), float("inf"), float("-inf")], ids=str)
def test_weights_of_another_kind_are_refused(model, processor, tmp_path, kind):
    with vltok.apply(model, vltok.TokenPacker(2), processor=processor) as handle:
        vltok.save(handle, tmp_path)
    path = tmp_path / "vltok.safetensors"
    weights = load_file(path)
    for name in (min(weights), max(weights)):
        save_file(poisoned(weights, name, kind), path)
        with pytest.raises(CheckpointError, match=name):
            vltok.load(model, tmp_path, processor=processor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_of_every_float_load_and_compute_what_they_should(model, processor, tmp_path, dtype):
    inputs = LLAVA.inputs(["w1 <image>"], [picture(0)])
    with vltok.apply(model, vltok.SOFT(ratio=2)) as handle, torch.no_grad():
        vltok.save(handle, tmp_path)
        for module in handle.added_modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.to(dtype))
        expected = model(**inputs).logits
    path = tmp_path / "vltok.safetensors"
    weights = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(path).items()}
    save_file(weights, path)
    with vltok.load(model, tmp_path), torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_values_beyond_the_range_of_the_models_dtype_are_refused(processor, tmp_path):
    model = LLAVA.model(dtype=torch.float16)
    with vltok.apply(model, vltok.TokenPacker(2), processor=processor) as handle:
        vltok.save(handle, tmp_path)
    path = tmp_path / "vltok.safetensors"
    weights = {name: x.float() for name, x in load_file(path).items()}
    weights[max(weights)].view(-1)[0] = 1e6
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="infinite as float16"):
        vltok.load(model, tmp_path, processor=processor)


@pytest.mark.parametrize("kind", [*OTHERS, float("nan")], ids=str)
@pytest.mark.parametrize("part", ["lm_head", "projector"])
def test_a_whole_model_with_weights_of_another_kind_is_refused(whole, changed, kind, part):
    path = changed / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if part in name and name.endswith("weight"))
    path.unlink()
    save_file(poisoned(weights, name, kind), path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"another kind|NaN|quantization_config"):
        vltok.from_pretrained(changed)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_file_of_weights_is_told_without_being_read(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    tensors = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.zeros(4, dtype=torch.int8)}
    (save_file if suffix == "safetensors" else torch.save)(tensors, path)
    with open_weights(path) as file:
        assert {name: (stored.shape, stored.dtype) for name, stored in file.stored.items()} == {
            "a": ((2, 3), torch.bfloat16),
            "b": ((4,), torch.int8),
        }
        assert torch.equal(file.read("a"), tensors["a"])


@pytest.mark.parametrize("odd", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_plain_values_are_refused(tmp_path, odd):
    torch.save({"a": odd}, tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match=r"a in .* is no plain tensor"):
        read_weights([tmp_path / "weights.bin"])


def test_a_weight_in_two_files_is_refused(tmp_path):
    for name in ("1", "2"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="another file"):
        read_weights(sorted(tmp_path.iterdir()))


@many
@given(st.binary(max_size=60), st.integers(0, 120), st.sampled_from(["safetensors", "bin"]))
def test_any_bytes_in_a_file_of_weights_are_read_or_refused(tmp_path_factory, noise, place, suffix):
    path = tmp_path_factory.mktemp("weights") / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)({"a": torch.ones(3), "b": torch.zeros(2, 2)}, path)
    right = path.read_bytes()
    for content in (noise, right[:place] + noise + right[place + len(noise) :], right[: -place or None]):
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            read_weights([path])


# Models of the hub


def test_a_model_of_the_hub_is_found_where_it_was_fetched_and_nowhere_else(tmp_path, monkeypatch):
    folder = tmp_path / "models--some--model"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_model("some/model") == str(folder / "snapshots" / "abc")
    assert find_model(tmp_path) == str(tmp_path)
    assert find_model("other/model", download=True) == "other/model"
    for name in ("other/model", tmp_path / "nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no model of that name was fetched"):
            find_model(name)
