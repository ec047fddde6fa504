"""Trainers of trl run as they are on a model with a method on: the pruned model is what they train."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset, Features, Image, List, Value
from tiny import LLAVA, QWEN2_5_VL, picture
from torch.nn import functional as F
from train.runs import losses
from train.templates import CHATS, Chat

import vltok

DIVPRUNE = vltok.DivPrune(keep_ratio=0.25)
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
SHORT = {**QUIET, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
two_families = pytest.mark.parametrize(
    "chat", [chat for chat in CHATS if chat.family in (LLAVA, QWEN2_5_VL)], ids=lambda chat: chat.family.name
)


def message(role: str, text: str, images: int = 0) -> dict:
    return {"role": role, "content": [{"type": "image", "text": None}] * images + [{"type": "text", "text": text}]}


def pictures(chat: Chat, column: str, rows: list[list[dict]]) -> Dataset:
    """Conversations about one picture each, of two sizes."""
    sizes = (chat.family.size, chat.family.other_size)
    images = [[picture(index, sizes[index % 2])] for index in range(len(rows))]
    parts = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    features = Features({"images": List(Image()), column: parts})
    return Dataset.from_dict({"images": images, column: rows}, features=features)


def trained_pruned(chat: Chat) -> tuple[torch.nn.Module, vltok.Handle]:
    model = chat.model()
    return model, vltok.apply(model, DIVPRUNE)


@two_families
def test_sft_on_pictures_takes_steps_of_the_pruned_model(chat: Chat, tmp_path):
    rows = [[message("user", f"w{n} w1", 1), message("assistant", f"w{n + 9} w2")] for n in range(4)]
    model, _ = trained_pruned(chat)
    arguments = trl.SFTConfig(str(tmp_path), max_steps=6, max_length=None, **SHORT)
    trainer = trl.SFTTrainer(model, arguments, None, pictures(chat, "messages", rows), None, chat.processor())
    assert model.dtype == torch.float32
    batches = []
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]

    batch = dict(batches[0])
    labels = batch.pop("labels")[:, 1:]
    fresh = chat.model()
    unpruned = F.cross_entropy(fresh(**batch).logits[:, :-1].flatten(0, 1), labels.flatten())
    with vltok.apply(fresh, DIVPRUNE):
        pruned = F.cross_entropy(fresh(**batch).logits[:, :-1].flatten(0, 1), labels.flatten())
    assert losses(trainer)[0] == pytest.approx(pruned.item(), rel=1e-3)
    assert abs(unpruned - pruned) > 0.01 * pruned


@two_families
def test_sft_packs_texts_without_padding_as_if_no_method_were_on(chat: Chat, tmp_path):
    """Trl packs no pictures; rows of several texts, told apart by their positions, are none of a method's business."""
    rows = [[{"role": "user", "content": f"w{n} w1"}, {"role": "assistant", "content": "w2 " * n}] for n in range(1, 5)]
    processor = chat.processor()
    processor.chat_template = processor.tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} {{ m.content if m.content is string else m.content[0].text }} </s> "
        "{% endfor %}"
    )
    found = []
    for has_method in (False, True):
        model, handle = trained_pruned(chat)
        if not has_method:
            handle.remove()
        arguments = trl.SFTConfig(str(tmp_path), max_steps=3, max_length=64, packing=True, **SHORT)
        trainer = trl.SFTTrainer(model, arguments, None, Dataset.from_dict({"messages": rows}), None, processor)
        assert trainer.padding_free and len(trainer.train_dataset) == 1
        trainer.train()
        found.append((losses(trainer), {name: parameter.detach() for name, parameter in model.named_parameters()}))
    (plain, expected), (under_method, weights) = found
    assert plain[-1] < plain[0]
    assert under_method == plain
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@two_families
def test_grpo_scores_completions_by_the_pruned_model_and_trains_it(chat: Chat, tmp_path):
    table = pictures(chat, "prompt", [[message("user", f"w{n} w1", 1)] for n in range(2)])
    model, _ = trained_pruned(chat)
    arguments = trl.GRPOConfig(
        str(tmp_path), max_steps=2, num_generations=2, max_completion_length=5, beta=0.0, temperature=1.0, **SHORT
    )
    reward = lambda completions, **columns: [float(len(str(text)) % 7) for text in completions]  # noqa: E731
    trainer = trl.GRPOTrainer(model, reward, arguments, table, None, chat.processor())
    seen, unpruned = [], chat.model()
    score = trainer._get_per_token_logps_and_entropies

    def record(model, input_ids, attention_mask, logits_to_keep, *args, **inputs):
        found = score(model, input_ids, attention_mask, logits_to_keep, *args, **inputs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        tensors |= {"input_ids": input_ids, "attention_mask": attention_mask}
        answers, real = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:].bool()
        pruned_and_not = []
        for each in (model, unpruned):
            with torch.no_grad():
                logits = each(**tensors).logits[:, -logits_to_keep - 1 : -1]
            pruned_and_not.append(logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0][real])
        seen.append((found[0].detach()[real], *pruned_and_not))
        return found

    trainer._get_per_token_logps_and_entropies = record
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    for found, expected, _ in seen:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (seen[0][1] - seen[0][2]).abs().max() > 0.01, "the first step, where weights are those of the unpruned model"
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
