"""Every family is trained as its chat template writes: labels are the answers, steps are steps of the pruned model."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyFamily, clip, picture
from torch.nn import functional as F
from train.records import record
from train.runs import RECIPE, losses
from train.templates import CHATS, Chat

import vltok
from vltok.train import Collator, VltokTrainer, add_lora, set_trainable
from vltok.train.collator import IGNORE

DIVPRUNE = vltok.DivPrune(keep_ratio=0.25)
chats = pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat.family.name)


def conversations(family: TinyFamily) -> list[dict]:
    """One image, two of different sizes in one turn, one in each of two turns, none; and videos, if it takes any."""
    first, second = picture(0, family.size), picture(1, family.other_size)
    rows = [
        record("one", [first], "<image>\nw1 w2", "w3 w4"),
        record("two", [first, second], "<image>w1<image> w2", "w11 w12"),
        record("later", [second, first], "w1\n<image>", "w13 w14", "<image> w2", "w15", "w4", "w16"),
        record("none", [], "w1 w2", "w17"),
    ]
    if family.video:
        rows.append({**record("video", [], "<video>\nw5", "w18 w19"), "video": clip(2, family.size, family.frames)})
    if family.video and family.mixes:
        rows.append({**record("both", [first], "<video> w5 <image>", "w20"), "video": [clip(3, family.size, 4)]})
    return rows


ANSWERS = {
    "one": ["w3 w4"],
    "two": ["w11 w12"],
    "later": ["w13 w14", "w15", "w16"],
    "none": ["w17"],
    "video": ["w18 w19"],
    "both": ["w20"],
}


@chats
def test_labels_are_the_answers_with_their_ends_and_nothing_else(chat: Chat):
    collator = Collator(chat.processor())
    assert (collator.write.style, collator.write.answers_by) == ("chat", chat.answers_by)
    rows = conversations(chat.family)
    for batch in (rows, rows[3:], rows[::-1]):
        made = collator(batch)
        found = [collator.processor.tokenizer.decode(row[row != IGNORE]) for row in made["labels"]]
        assert found == [" ".join(f"{answer} {chat.end}" for answer in ANSWERS[row["id"]]) for row in batch]
        learned = made["labels"] != IGNORE
        assert torch.equal(made["labels"][learned], made["input_ids"][learned])
        assert made["attention_mask"][learned].all()


@chats
def test_prompts_are_what_the_processor_makes_of_the_template_by_itself(chat: Chat):
    """For one image and one answer; where answers end by what the template leaves out, that is one token more."""
    collator = Collator(chat.processor())
    image = picture(0, chat.family.size)
    made = collator([record("s", [image], "<image>w1 w2", "w3 w4")])
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w1 w2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w3 w4"}]},
    ]
    expected = collator.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    ids = made["input_ids"][0].tolist()
    assert ids[: expected["input_ids"].shape[1]] == expected["input_ids"][0].tolist()
    assert ids[expected["input_ids"].shape[1] :] == ([] if chat.end in chat.template else [2])
    assert torch.equal(made["pixel_values"], expected["pixel_values"])


def trainer(chat: Chat, out, rows: list[dict], parts: str = "llm", lora: int | None = None, **arguments):
    torch.manual_seed(0)
    handle = vltok.apply(chat.model(), DIVPRUNE)
    set_trainable(handle, parts)
    model = handle.model if lora is None else add_lora(handle, lora)
    settings = {"grad_accum": 1, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    args = RECIPE.arguments(out, **{**settings, **arguments})
    return VltokTrainer(handle, args, Collator(chat.processor()), rows, model=model)


def cross_entropy(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Over answer tokens, by the formula, from the logits that the model gives without labels."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    targets = batch["labels"][:, 1:]
    return F.cross_entropy(logits[:, :-1][targets != IGNORE].float(), targets[targets != IGNORE])


@chats
def test_one_step_is_that_of_the_pruned_models_own_logits(chat: Chat, tmp_path):
    """A step of plain gradient descent, by the trainer in two batches and by hand in one, which hold text alone too."""
    rows = conversations(chat.family)[:4]
    settings = {"optim": "sgd", "learning_rate": 0.01, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings |= {"warmup_steps": 0, "per_device_batch": 2, "grad_accum": 2, "train_sampling_strategy": "sequential"}
    by_trainer = trainer(chat, tmp_path, rows, **settings)
    by_trainer.train()

    model = chat.model().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with vltok.apply(model, DIVPRUNE) as handle:
        handle.model.requires_grad_(False)
        set_trainable(handle, "llm")
        batch = Collator(chat.processor())(rows)
        loss = cross_entropy(model, batch)
        loss.backward()
    with torch.no_grad():
        unpruned = cross_entropy(model, batch)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert abs(unpruned - loss) > 1e-3 * loss, "pruning made no difference, so the test couldn't tell"
    assert losses(by_trainer)[0] == pytest.approx(loss.item(), rel=1e-4)
    after = dict(model.named_parameters())
    moved = 0
    for name, parameter in by_trainer.handle.model.named_parameters():
        torch.testing.assert_close(parameter, after[name], rtol=1e-3, atol=1e-5)
        moved += not torch.equal(parameter, before[name])
    assert moved


@pytest.mark.parametrize(("parts", "lora"), [("llm", None), ("llm", 4), ("full", None)], ids=["llm", "lora", "full"])
@chats
def test_training_under_pruning_lowers_the_loss_of_what_trains_alone(chat: Chat, parts: str, lora, tmp_path):
    rows = conversations(chat.family)[:4]
    settings = {"max_steps": 6, "per_device_batch": 4, "activation_checkpointing": True}
    run = trainer(chat, tmp_path, rows, parts, lora, **settings)
    model = run.weights.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed <= trains
    if lora is not None:
        assert all("lora_" in name for name in changed)
