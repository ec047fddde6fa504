"""What a converted TokenPacker checkpoint is on disk: files, names, config, processor, tokens."""

from __future__ import annotations

import json

import pytest
import torch
from convert.official import (
    CLIP,
    EMBED_DIM,
    LEVELS,
    LM,
    ROWS,
    SCALE,
    SIDE,
    TABLES,
    every_weight,
    prompt,
    save_tokenizer,
    write,
)
from safetensors.torch import load_file
from tiny import picture
from transformers import AutoModelForImageTextToText, AutoProcessor

import vltok
from vltok.convert.token_packer import convert


def test_the_folder_holds_what_transformers_and_vltok_write_themselves(converted, tmp_path):
    files = {path.name for path in converted.iterdir()}
    parts = {name for name in files if name.startswith("model-")}
    assert files - parts == {
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "vltok_config.json", "vltok.safetensors"),
    }
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == parts
    weights = every_weight(converted)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert sum(len(load_file(converted / name)) for name in parts) == len(weights), "a weight is written once"

    handle = vltok.from_pretrained(converted)
    vltok.save(handle, tmp_path / "adapter")
    own, again = (load_file(folder / "vltok.safetensors") for folder in (converted, tmp_path / "adapter"))
    assert own.keys() == again.keys()
    assert all(torch.equal(own[name], again[name]) for name in own)
    handle.model.save_pretrained(tmp_path / "model")
    for saved, file in ((tmp_path / "adapter", "vltok_config.json"), (tmp_path / "model", "config.json")):
        own, again = (json.loads((folder / file).read_text()) for folder in (converted, saved))
        for part in ("text_config", "vision_config"):  # a loaded model repeats its dtype there
            again.get(part, {}).pop("dtype", None)
        assert own == again
    handle.remove()
    handle.model.save_pretrained(tmp_path / "plain")
    plain = {name for name in load_file(tmp_path / "plain" / "model.safetensors") if "projector" not in name}
    assert weights.keys() == plain


def test_the_method_is_described_with_the_official_settings(converted):
    handle = vltok.from_pretrained(converted)
    assert handle.methods == (vltok.TokenPacker(SCALE, LEVELS, embed_dim=EMBED_DIM, num_heads=EMBED_DIM // 128),)
    assert handle.model.config.vision_feature_layer == list(LEVELS)
    handle.remove()
    assert handle.model.config.vision_feature_layer == -2
    assert handle.model.config.image_seq_length == SIDE**2


def test_transformers_alone_refuses_the_folder_and_names_vltok(converted):
    with pytest.raises(Exception, match=r"vltok\.from_pretrained"):
        AutoModelForImageTextToText.from_pretrained(converted)


def test_the_language_model_keeps_its_official_settings(official, converted):
    text = vltok.from_pretrained(converted).model.config.text_config
    for name in LM.keys() - {"vocab_size", "rope_theta", "pad_token_id"}:
        assert getattr(text, name) == LM[name], name
    assert text.rope_parameters["rope_theta"] == LM["rope_theta"]
    assert text.use_cache, "it was off for training only"


def test_scaled_rotary_positions_are_taken_over(official, clip_folder, tmp_path):
    config = {**official.config, "rope_scaling": {"type": "linear", "factor": 2.0}}
    convert(write(tmp_path / "official", config, official.weights(), "bin"), tmp_path / "out", vision_tower=clip_folder)
    rope = vltok.from_pretrained(tmp_path / "out").model.config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, LM["rope_theta"])


def test_the_processor_is_that_of_the_plain_model(converted):
    processor = AutoProcessor.from_pretrained(converted)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (14, 1)
    assert processor.vision_feature_select_strategy == "default"
    inputs = prompt(processor)
    assert inputs.pixel_values.shape == (1, 3, 56, 56)
    assert (inputs.input_ids == processor.image_token_id).sum() == SIDE**2


@pytest.mark.parametrize(("aspect", "is_padded"), [("pad", True), ("square", False), ("slice", False), (None, False)])
def test_pictures_are_padded_to_a_square_if_training_padded_them(official, clip_folder, tmp_path, aspect, is_padded):
    config = {**official.config, "image_aspect_ratio": aspect}
    source = write(tmp_path / "official", config, official.weights(), "bin")
    convert(source, tmp_path / "out", vision_tower=clip_folder)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    white = picture(0, (112, 56)).point(lambda _: 255)
    pixels = processor(text="<image>", images=white, return_tensors="pt").pixel_values[0]
    assert pixels.shape == (3, 56, 56)
    assert (pixels.std() > 0.1) == is_padded
    assert torch.allclose(pixels[:, 0].mean(), torch.zeros(()), atol=0.02) == is_padded, "padding is the mean colour"


def test_a_tower_folder_may_say_how_pictures_are_normalised(source, clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "crop_size": 224, "size": 224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "out", vision_tower=tmp_path)
    images = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    assert list(images.image_mean) == settings["image_mean"]
    assert images.crop_size["height"] == images.crop_size["width"] == CLIP["image_size"]


# Tokens


def test_missing_tokens_are_added_with_mean_rows(official, converted):
    handle = vltok.from_pretrained(converted)
    words, config = handle.processor.tokenizer, handle.model.config
    image, pad = words.convert_tokens_to_ids(["<image>", "<pad>"])
    assert (image, pad) == (43, 44), "after the words, where the tables have rows that no token used"
    assert (config.image_token_id, handle.processor.image_token_id) == (image, image)
    assert (config.text_config.pad_token_id, words.pad_token_id) == (pad, pad)
    assert config.text_config.vocab_size == ROWS
    ids = words.encode("w1<image>w2<pad>", add_special_tokens=False)
    assert (ids[1], ids[3]) == (image, pad), "found without spaces around them"
    assert words.decode(ids, skip_special_tokens=True).split() == ["w1", "w2"]
    for name, table in zip(TABLES, (handle.model.get_input_embeddings(), handle.model.lm_head), strict=True):
        before = official.weights()[name]
        for row in (image, pad):
            torch.testing.assert_close(table.weight[row], before.mean(0))
        kept = [row for row in range(ROWS) if row not in (image, pad)]
        assert torch.equal(table.weight[kept], before[kept])


def test_tables_without_spare_rows_grow(official, clip_folder, tmp_path):
    weights = official.weights()
    weights |= {name: weights[name][:43].clone() for name in TABLES}
    source = write(tmp_path / "official", {**official.config, "vocab_size": 43}, weights, "bin")
    convert(source, tmp_path / "out", vision_tower=clip_folder)
    model = vltok.from_pretrained(tmp_path / "out").model
    assert model.config.text_config.vocab_size == 45
    for name, table in zip(TABLES, (model.get_input_embeddings(), model.lm_head), strict=True):
        assert table.weight.shape == (45, LM["hidden_size"])
        assert torch.equal(table.weight[:43], weights[name])
        torch.testing.assert_close(table.weight[43:], weights[name].mean(0).expand(2, -1))


def test_tokens_that_are_there_are_left_alone(official, clip_folder, tmp_path):
    source = write(tmp_path / "official", official.config, official.weights(), "bin")
    save_tokenizer(source, ["<unk>", "<s>", "</s>", "<image>", "<pad>"], pad_token="<pad>")
    said = convert(source, tmp_path / "out", vision_tower=clip_folder)
    assert "added none" in said
    weights = every_weight(tmp_path / "out")
    assert torch.equal(weights["language_model.model.embed_tokens.weight"], official.weights()[TABLES[0]])
    config = vltok.from_pretrained(tmp_path / "out").model.config
    assert (config.image_token_id, config.text_config.pad_token_id) == (3, 4)


def test_an_official_pad_token_stays(official, clip_folder, tmp_path):
    source = write(tmp_path / "official", official.config, official.weights(), "bin")
    save_tokenizer(source, ["<unk>", "<s>", "</s>"], pad_token="<unk>")
    convert(source, tmp_path / "out", vision_tower=clip_folder)
    handle = vltok.from_pretrained(tmp_path / "out")
    assert handle.processor.tokenizer.pad_token == "<unk>"
    assert handle.model.config.text_config.pad_token_id == 0


def test_a_sentencepiece_tokenizer_is_read(official, clip_folder, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    source = write(tmp_path / "official", official.config, official.weights(), "bin")
    for file in source.glob("*token*"):
        file.unlink()
    text = tmp_path / "text"
    text.write_text("the cat sat\non the mat\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(source / "tokenizer"), model_type="bpe", vocab_size=30, minloglevel=2
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": None, "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "out", vision_tower=clip_folder)
    words = vltok.from_pretrained(tmp_path / "out").processor.tokenizer
    plain = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    assert words("the cat").input_ids == [1, *plain.encode("the cat")]
    assert words.convert_tokens_to_ids(["<image>", "<pad>"]) == [30, 31]


def test_a_sentencepiece_tokenizer_says_which_packages_read_it(official, clip_folder, tmp_path, monkeypatch):
    source = write(tmp_path / "official", official.config, official.weights(), "bin")
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    monkeypatch.setattr("vltok.convert.token_packer.is_sentencepiece_available", lambda: False)
    with pytest.raises(ImportError, match="pip install sentencepiece protobuf"):
        convert(source, tmp_path / "out", vision_tower=clip_folder)
