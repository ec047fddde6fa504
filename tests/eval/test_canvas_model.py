"""The shipped weights: they load offline with plain Auto classes, are small, and really look at the picture."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from eval.canvas.data import NUMBERS, ONE_WORD, Canvases, kinds_known
from eval.canvas.model import MODEL_DIR, build_tokenizer
from eval.canvas.runner import Case, draw_questions, encode, evaluate


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(MODEL_DIR, local_files_only=True)


def test_the_weights_are_bfloat16_and_at_most_eight_megabytes():
    path = MODEL_DIR / "model.safetensors"
    assert path.stat().st_size <= 8e6
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118, not a dict
    assert (MODEL_DIR / "README.md").is_file()


def test_the_classes_are_those_of_a_real_llava(shipped):
    model, processor = shipped
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.config.vision_feature_layer == -2 and model.config.vision_feature_select_strategy == "default"
    tokenizer = processor.tokenizer
    assert tokenizer.padding_side == "left"
    assert len({tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, "<image>"}) == 5
    assert tokenizer.get_vocab().items() <= build_tokenizer(NUMBERS).get_vocab().items()
    assert set(ONE_WORD) <= set(kinds_known(tokenizer.get_vocab()))
    assert tokenizer("what is xylophone")["input_ids"][-1] == tokenizer.unk_token_id


def test_generate_answers_a_left_padded_batch_of_unequal_prompts_like_each_prompt_alone(shipped):
    model, processor = shipped
    canvases = Canvases("val", 5)
    texts = [f"<image> {q.text}" for q in canvases.questions(1)]
    assert len({len(text.split()) for text in texts}) > 1
    images = [canvases.canvas(1).image] * len(texts)
    batch = processor(images=images, text=texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"].min() == 0
    together = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        alone = processor(images=[image], text=[text], return_tensors="pt")
        assert torch.equal(model.generate(**alone)[0, alone["input_ids"].shape[1] :], together[row])
    assert (together[:, 1] == model.generation_config.eos_token_id).all()


def test_it_answers_validation_questions_and_fails_with_the_wrong_picture(shipped):
    model, processor = shipped
    canvases = Canvases("val", 7)
    questions = draw_questions(canvases, 100)
    right, wrong = (
        evaluate(model, processor, Case("", 1.0), encode(processor, canvases, questions, 16, shuffled), questions)
        for shuffled in (False, True)
    )
    for kind, least in (("exist", 0.85), ("quadrant", 0.7), ("where", 0.7)):
        assert right.accuracy(kind) >= least
    assert wrong.accuracy("exist") < 0.75
    assert wrong.accuracy("quadrant") < 0.45 and wrong.accuracy("where") < 0.6
