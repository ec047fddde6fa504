"""Training of the canvas VQA model: targets, sequences, attention, optimizer, resuming, and what is written to disk."""

import json

import numpy as np
import pytest
import torch

from eval.canvas import attention, batches
from eval.canvas.batches import IGNORE, PREFIX, BatchStream
from eval.canvas.data import GRID, KINDS, NUMBERS, Canvases, digits, vocabulary
from eval.canvas.losses import Heads, answer_loss, tower_features, tower_loss
from eval.canvas.model import NEIGHBOURS, build_model, build_processor, build_tokenizer, export, load
from eval.canvas.muon import Muon, orthogonalize
from eval.canvas.steps import Phase
from eval.canvas.train import Trainer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(NUMBERS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return build_model(tokenizer).eval()


@pytest.fixture(scope="module")
def batch(tokenizer):
    return BatchStream(Canvases("train", 1, kinds=KINDS), tokenizer, 3, 2, 9)[1]


def test_dense_targets_say_what_each_patch_shows():
    canvases = Canvases("train", 1, kinds=KINDS)
    batch = BatchStream(canvases, build_tokenizer(NUMBERS), 2, 1, 6)[0]
    for row in range(2):
        canvas = canvases.canvas(row)
        for patch in range(GRID * GRID):
            y, x = divmod(patch, GRID)
            ink = canvas.ink[:, y, x]
            owner = int(ink.argmax())
            if ink.max() >= 0.08:
                assert batch.patch_label[row, patch] == canvas.labels[owner]
                cx, cy = canvas.centres[owner]
                assert batch.patch_quadrant[row, patch] == 2 * (cy > 64) + (cx > 64)
                expected = [cx / 64 - 1, cy / 64 - 1]
                rows, columns = np.nonzero(canvas.ink[owner] >= 0.08)
                box = [columns.min(), rows.min(), columns.max(), rows.max()]
                assert batch.patch_box[row, patch].tolist() == box
            else:
                assert batch.patch_label[row, patch] in (10, IGNORE)
                assert batch.patch_quadrant[row, patch] == IGNORE
                assert batch.patch_box[row, patch].tolist() == [IGNORE] * 4
                expected = [(8 * x + 4) / 64 - 1, (8 * y + 4) / 64 - 1]
            assert batch.patch_centre[row, patch].tolist() == pytest.approx(expected)
        assert batch.patch_is_centre[row].sum() <= len(canvas.labels)
        assert set(batch.present[row].nonzero().flatten().tolist()) == set(canvas.labels.tolist())
        assert batch.count[row] == len(canvas.labels) - 1


def test_a_crop_is_a_window_of_its_canvas_with_the_true_positions(tokenizer):
    canvases = Canvases("train", 2, min_items=6)
    stream = BatchStream(canvases, tokenizer, 4, 1, 6, crops=True)
    crops = stream[0]
    assert crops.pixels.shape == (4, 3, 64, 64) and crops.patch_index.shape == (4, 64)
    assert not torch.equal(crops.patch_index[0], crops.patch_index[2])  # two windows of one canvas
    for row, number in enumerate((0, 1, 0, 1)):
        image = torch.from_numpy(canvases.canvas(number).image).permute(2, 0, 1).float() / 255
        for k, patch in enumerate(crops.patch_index[row].tolist()):
            y, x = divmod(patch, GRID)
            tile = (image[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] - 0.5) / 0.25
            i, j = divmod(k, 8)
            torch.testing.assert_close(crops.pixels[row, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8], tile)


def test_a_whole_canvas_given_as_patches_equals_the_tower_as_it_is(model, batch):
    patches, cls = tower_features(model, batch)
    output = model.model.vision_tower(batch.pixels, output_hidden_states=True)
    assert torch.equal(patches, output.hidden_states[-2][:, 1:])
    assert torch.equal(cls, output.pooler_output)
    assert model.model.vision_tower.embeddings.image_size == 128
    assert model.model.vision_tower.embeddings.position_ids.shape == (1, 257)


def test_fresh_tower_heads_look_at_their_neighbours(model):
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(torch.zeros(1, 3, 128, 128), output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    for number, offsets in enumerate(NEIGHBOURS):
        for head, offset in enumerate(offsets):
            around = torch.zeros(9, 9)  # mean attention by relative position, over queries away from the border
            for row in range(4, 12):
                for column in range(4, 12):
                    seen = maps[number][0, head, 1 + row * GRID + column, 1:].reshape(GRID, GRID)
                    around += seen[row - 4 : row + 5, column - 4 : column + 5]
            down, right = divmod(int(around.argmax()), 9)
            assert (down - 4, right - 4) == offset


def test_each_question_block_gives_the_logits_it_gives_alone(model, batch, tokenizer):
    """The 4-D mask and restarting positions: a block neither sees the others nor knows that they are there."""
    row = 0
    with torch.no_grad():
        projected = model.model.multi_modal_projector(tower_features(model, batch)[0])
        together = _logits(model, batch, projected)
        for block in range(1, int(batch.block[row].max()) + 1):
            at = (batch.block[row] == block).nonzero().flatten()
            ids = torch.cat([batch.input_ids[row, :PREFIX], batch.input_ids[row, at]])[None]
            alone = model(input_ids=ids, pixel_values=batch.pixels[row : row + 1]).logits[0, PREFIX:]
            torch.testing.assert_close(together[row, at], alone, atol=2e-4, rtol=1e-4)


def _logits(model, batch, projected):
    decoder = model.model.language_model
    words = decoder.embed_tokens(batch.input_ids)
    embeds = torch.cat([words[:, :1], projected, words[:, PREFIX:]], dim=1)
    mask, positions = batch.attention_mask(), batch.position_ids
    hidden = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    return model.lm_head(hidden.last_hidden_state)


def test_block_attention_equals_sdpa_with_the_mask(model, batch):
    decoder = model.model.language_model
    with torch.no_grad():
        projected = model.model.multi_modal_projector(tower_features(model, batch)[0])
        plain = _logits(model, batch, projected)
        attention.use_block_attention(decoder)
        try:
            ours = _logits(model, batch, projected)
        finally:
            decoder.config._attn_implementation = "sdpa"
    scored = batch.block > 0
    torch.testing.assert_close(ours[scored], plain[scored], atol=2e-4, rtol=1e-4)


def test_only_answers_and_the_ends_after_them_are_scored(batch, tokenizer):
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    canvases, kinds = Canvases("train", 1, kinds=KINDS), set()
    for row in range(3):
        asked = {}
        every = canvases.all_questions(3 + row, canvases.canvas(3 + row), 2, 5)
        for questions in every.values():
            asked |= {q.text: (q.kind, q.answer) for q in questions}
        for block in range(1, int(batch.block[row].max()) + 1):
            at = batch.block[row] == block
            tokens = [words[i] for i in batch.input_ids[row, at]]
            target, kind = batch.target[row, at].tolist(), batch.kind[row, at].tolist()
            length = sum(each != IGNORE for each in kind)
            name, answer = asked[" ".join(tokens[:-length])]
            assert tokens[-length:] == answer.split() == [words[each] for each in target[-length - 1 : -1]]
            assert words[target[-1]] == "</s>" and kind[-1] == IGNORE
            assert {KINDS[each] for each in kind[-length - 1 : -1]} == {name}
            assert set(target[: -length - 1]) <= {IGNORE}
            kinds.add(name)
    assert kinds == set(KINDS)
    assert (batch.target[:, :PREFIX] == IGNORE).all()


def test_losses_reach_every_part_and_report_per_kind(model, batch):
    heads = Heads(128, 10)
    patches, cls = tower_features(model, batch)
    dense, figures = tower_loss(heads, patches, cls, batch)
    answers, hits = answer_loss(model, model.model.multi_modal_projector(patches), batch)
    model.zero_grad()
    (dense + answers).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    without = [n for n, _ in model.named_parameters() if n not in reached and "k_proj.bias" not in n]
    model.zero_grad()
    assert without == []
    assert hits[1].sum() == batch.block.max(dim=1).values.sum()
    assert all(np.isfinite(value) for value in figures.values())


def test_an_answer_is_right_if_all_of_its_words_are(model, batch, tokenizer):
    """Of each question in turn the model is made to say the right words, or all but one of them."""
    real = model.lm_head.forward
    scored, hits = batch.target != IGNORE, []
    for wrong in range(-1, 5):

        def say(hidden, wrong=wrong):
            target = batch.target[scored].clone()
            for row, block in {(r, b) for r, b in zip(*map(list, _places(batch)), strict=True)}:
                own = ((scored.nonzero()[:, 0] == row) & (batch.block[scored] == block)).nonzero().flatten()
                if 0 <= wrong < len(own):
                    target[own[wrong]] = tokenizer.unk_token_id
            return torch.nn.functional.one_hot(target, len(tokenizer)).float() + 0 * real(hidden)

        model.lm_head.forward = say
        try:
            projected = torch.zeros(3, 256, 128)
            hits.append(answer_loss(model, projected, batch)[1])
        finally:
            model.lm_head.forward = real
    asked = hits[0][1]
    length = torch.tensor([{"box": 4, "read": 2}.get(kind, 1) for kind in KINDS])
    assert asked.min() > 0 and torch.equal(hits[0][0], asked)
    for wrong, (right, again) in enumerate(hits[1:]):
        assert torch.equal(right, asked * (wrong >= length)) and torch.equal(again, asked)  # behind the answer is </s>


def _places(batch):
    rows, columns = (batch.block > 0).nonzero(as_tuple=True)
    return rows.tolist(), batch.block[rows, columns].tolist()


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix)
    values = u.T @ result @ vt.T
    torch.testing.assert_close(values, torch.diag(values.diag()), atol=1e-4, rtol=0)
    big = s / s.norm() > 0.05
    assert values.diag()[big].min() > 0.6 and values.diag().max() < 1.3


def test_muon_lowers_a_loss_and_refuses_vectors():
    torch.manual_seed(0)
    weight, target = torch.zeros(6, 4, requires_grad=True), torch.randn(6, 4)
    optimizer = Muon([weight], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (weight - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    with pytest.raises(ValueError, match="2-D"):
        Muon([torch.zeros(3, requires_grad=True)])


def _phases(steps):
    return [
        Phase("crops", steps, 2, 0.01, 1e-3, 0.3, min_items=6),
        Phase("tower", steps, 2, 0.01, 1e-3, 0.3, min_items=1),
        Phase("language", steps, 2, 0.01, 1e-3, 0.3, min_items=1),
        Phase("joint", steps, 2, 0.01, 1e-3, 0.0, min_items=1),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(folder, digits(), 0, _phases(2), workers=0)
    trainer.validate = lambda phase: {}
    assert trainer.run()
    return trainer


def test_every_phase_trains_its_parts_and_no_others(trained):
    torch.manual_seed(0)
    fresh = dict(build_model(trained.tokenizer).named_parameters())
    changed = {name for name, p in trained.model.named_parameters() if not torch.equal(p, fresh[name])}
    assert set(fresh) - changed <= {name for name in fresh if "k_proj.bias" in name}


def test_the_language_phase_leaves_the_tower_alone(tmp_path):
    trainer = Trainer(tmp_path, digits(), 0, [_phases(1)[2]], workers=0)
    trainer.validate = lambda phase: {}
    before = {name: p.clone() for name, p in trainer.model.model.vision_tower.named_parameters()}
    trainer.run()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.model.vision_tower.named_parameters())


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(trained, tmp_path):
    first = Trainer(tmp_path, digits(), 0, _phases(2), workers=0)
    first.validate = lambda phase: {}
    while not first.run(minutes=0):  # stops after every step
        again = Trainer(tmp_path, digits(), 0, _phases(2), workers=0)
        again.validate = lambda phase: {}
        again.resume()
        first = again
    for (name, one), (_, other) in zip(
        trained.model.state_dict().items(), first.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(record.get("event") == "start" for record in log) > 4


def test_a_run_starts_from_a_trained_model_that_knows_fewer_words(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.canvas.model.vocabulary", lambda names: vocabulary(names)[:33])
    short = build_tokenizer(NUMBERS)
    torch.manual_seed(5)
    old = build_model(short)
    export(old, build_processor(short), tmp_path / "old")
    monkeypatch.undo()
    trainer = Trainer(tmp_path, digits(), 0, _phases(1), workers=0)
    fresh = trainer.model.lm_head.weight[38:].clone()
    trainer.start_from(tmp_path / "old")
    for name, value in trainer.model.state_dict().items():
        trained = old.state_dict()[name].bfloat16().float()
        assert torch.equal(value[: len(trained)], trained), name
    assert torch.equal(trainer.model.lm_head.weight[38:], fresh) and len(fresh) == 25

    other = build_tokenizer(("shoe", "bag"))
    export(build_model(other), build_processor(other), tmp_path / "other")
    with pytest.raises(ValueError, match="are other ones"):
        trainer.start_from(tmp_path / "other")


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        Trainer(tmp_path, digits(), 0, _phases(1), workers=0).resume()


def test_an_exported_model_loads_with_the_auto_classes_and_answers_alike(model, tokenizer, batch, tmp_path):
    export(model, build_processor(tokenizer), tmp_path)
    loaded, processor = load(tmp_path)
    assert type(processor).__name__ == "LlavaProcessor" and loaded.config.vision_feature_layer == -2
    for (name, one), (_, other) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(one.bfloat16().float(), other), name
    inputs = processor(
        images=[Canvases("train", 1).canvas(3).image], text=["<image> is there a seven"], return_tensors="pt"
    )
    torch.testing.assert_close(inputs["pixel_values"][0], batch.pixels[0], atol=1e-5, rtol=0)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == batches.NUM_VISUAL
    assert loaded.generation_config.max_new_tokens == 5
