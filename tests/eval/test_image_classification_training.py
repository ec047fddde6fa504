"""Training, testing and distilling in image classification, on pictures that a tiny ViT can tell apart."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vltok
from eval.image_classification.data import ArrayPictures
from eval.image_classification.models import ModelSpec
from eval.image_classification.preprocess import Task, for_model
from eval.image_classification.training import Recipe, evaluate, fit

SPEC = ModelSpec("vit_tiny_patch16_224", dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2))
RECIPE = Recipe(steps=6, batch_size=8, lr=3e-3)
SOFT = vltok.SOFT(ratio=2)


@pytest.fixture(scope="module")
def task():
    return make_task()


def make_task(**options):
    """Six colours, with noise."""
    random = np.random.default_rng(0)
    labels = np.arange(48) % 6
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
    images = (60 + 120 * colours[labels][:, None, None] + random.normal(0, 15, (48, 16, 16, 3))).astype(np.uint8)
    train, test = ArrayPictures(images[:36], labels[:36]), ArrayPictures(images[36:], labels[36:])
    return Task(train, test, for_model(SPEC.create(0, 6)), "crop-flip,pad=1", **options)


def test_arms_of_a_seed_share_the_weights_that_both_have():
    plain, soft = (SPEC.build(1, 6, methods)[0].state_dict() for methods in ((), (SOFT,)))
    shared = plain.keys() & soft.keys()
    assert len(shared) > 10 and plain.keys() - shared and soft.keys() - shared
    assert all(torch.equal(plain[name], soft[name]) for name in shared)
    again, other = (SPEC.build(seed, 6, (SOFT,))[0].state_dict() for seed in (1, 2))
    assert all(torch.equal(soft[name], again[name]) for name in soft)
    assert not torch.equal(other["head.weight"], again["head.weight"])


def test_a_run_learns_and_its_curve_ends_with_its_result(task):
    model, _ = SPEC.build(0, 6)
    recipe = Recipe(steps=40, batch_size=12, lr=5e-3)
    before = evaluate(model, task)["top1"]
    kept, result = fit(model, None, task, recipe, 0, eval_every=15)
    assert kept is model and [point["step"] for point in result["curve"]] == [15, 30, 40]
    assert result["top1"] == result["curve"][-1]["top1"] >= 0.75 > 0.4 > before
    assert result["curve"][-1]["train_loss"] < result["curve"][0]["train_loss"]
    assert result["top1"] == evaluate(model, task)["top1"] and model.training and result["images_per_second"] > 0


def test_the_average_of_the_weights_is_what_is_tested_and_kept(task):
    recipe = Recipe(steps=5, batch_size=8, lr=3e-3, ema=0.5)
    model, handle = SPEC.build(0, 6, (SOFT,))
    steps = []
    kept, result = fit(model, handle, task, recipe, 0, advance=lambda note: steps.append(model.head.weight.clone()))
    wanted = steps[0]  # timm starts with the weights after the first step
    for weight in steps[1:]:
        wanted = 0.5 * wanted + 0.5 * weight
    torch.testing.assert_close(kept.head.weight, wanted)
    assert result["loss"] == evaluate(kept, task)["loss"] != evaluate(model, task)["loss"]


@pytest.mark.parametrize("methods", [(), (SOFT,)], ids=["plain", "soft"])
def test_a_seed_decides_a_run(task, methods):
    def run(seed, noise):
        model, handle = SPEC.build(seed, 6, methods)
        torch.manual_seed(noise)
        fit(model, handle, task, RECIPE, seed)
        return nn.utils.parameters_to_vector(model.parameters())

    first = run(0, 11)
    assert torch.equal(first, run(0, 12)) and not torch.equal(first, run(1, 11))


def test_losses_that_methods_leave_are_added(task):
    class FiveMore:
        def loss(self):
            return torch.tensor(5.0)

    plain, more = (fit(SPEC.build(0, 6)[0], handle, task, RECIPE, 0)[1]["curve"][-1] for handle in (None, FiveMore()))
    assert more["train_loss"] == pytest.approx(plain["train_loss"] + 5, abs=1e-5)


def test_evaluation_counts_what_is_right_among_one_and_among_five(task):
    ((_, labels),) = task.test_batches()
    ranks = torch.tensor([0, 0, 0, 1, 4, 4, 4, 5, 5, 2, 3, 0])  # of the true class among the six logits
    logits = torch.zeros(12, 6)
    for row, label, rank in zip(logits, labels, ranks, strict=True):
        others = [k for k in range(6) if k != label]
        for place, k in enumerate([*others[:rank], int(label), *others[rank:]]):
            row[k] = -float(place)

    class Known(nn.Module):
        at = 0

        def forward(self, x):
            assert not self.training
            self.at += len(x)
            return logits[self.at - len(x) : self.at]

    figures = evaluate(Known(), task)
    assert figures["top1"] == pytest.approx(4 / 12) and figures["top5"] == pytest.approx(10 / 12)
    assert figures["tested"] == 12
    assert figures["loss"] == pytest.approx(float((logits.logsumexp(1) + ranks).mean()), rel=1e-6)


def test_the_rate_warms_up_to_its_peak_and_falls_to_a_hundredth():
    model = nn.Linear(2, 2)
    recipe = Recipe(steps=100, lr=1.0, warmup=0.1)
    optimizer, schedule = recipe.optimise(model, 100)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 101):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01) and rates[5] == pytest.approx(0.505)
    assert rates[10] == max(rates) and rates[10] == pytest.approx(1, abs=0.03)
    assert rates[55] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * 0.55)) / 2)
    assert rates[100] == pytest.approx(0.01)
    decays = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    assert decays == {0.05: 4, 0.0: 2}


def test_epochs_are_counted_in_whole_batches():
    assert Recipe(epochs=2, batch_size=10).total_steps(39) == 6
    assert Recipe(epochs=0.5, batch_size=10).total_steps(39) == 2
    assert Recipe(steps=7, batch_size=10).total_steps(39) == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(epochs=-1), "above 0, got {'epochs': -1}"),
        (dict(lr=0), "above 0, got {'lr': 0}"),
        (dict(warmup=2), "shares from 0 to 1, got {'warmup': 2}"),
        (dict(mixup=0.2, batch_size=7), "even batch size"),
        (dict(clip_grad=0), "above 0"),
        (dict(weight_decay=-1), "from 0 on"),
        (dict(distill=2), "shares"),
        (dict(distill_by="attention"), "logits or features"),
    ],
)
def test_budgets_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)
    with pytest.raises(ValueError, match="can't make the optimizer 'adamx'"):
        Recipe(optimizer="adamx").optimise(nn.Linear(2, 2), 10)


def test_mixup_and_limited_gradients_change_a_run(task):
    plain, mixed, cut = (
        fit(SPEC.build(0, 6)[0], None, task, recipe, 0)[1]["curve"][-1]["train_loss"]
        for recipe in (
            RECIPE,
            Recipe(steps=6, batch_size=8, lr=3e-3, mixup=1.0),
            Recipe(steps=6, batch_size=8, lr=3e-3, optimizer="sgd", clip_grad=1e-6),
        )
    )
    assert len({plain, mixed, cut}) == 3


def test_autocast_multiplies_in_bfloat16():
    seen = []
    model, _ = SPEC.build(0, 6)
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    fit(model, None, make_task(amp=True), Recipe(steps=1, batch_size=8), 0)
    assert set(seen) == {torch.bfloat16}


def test_a_loss_that_is_not_finite_stops_the_run(task):
    model, _ = SPEC.build(0, 6)
    nn.init.constant_(model.head.bias, torch.inf)
    with pytest.raises(FloatingPointError, match="smaller --lr"):
        fit(model, None, task, RECIPE, 0)


@pytest.mark.parametrize("by", ["logits", "features"])
def test_the_loss_of_distillation_is_that_of_its_definition(task, by):
    model, teacher = SPEC.build(0, 6)[0], SPEC.build(5, 6)[0].eval()
    ((images, labels),) = task.test_batches()
    recipe = Recipe(distill=0.3, distill_by=by, temperature=3.0, label_smoothing=0.1)
    loss = recipe.task(model, teacher, "cpu").eval()(images, labels)["loss"]
    answers, wanted = model(images), teacher(images)
    q, p = ((x / 3).softmax(1) for x in (answers, wanted))
    if by == "logits":
        apart = sum(9 * p[i, k] * (p[i, k] / q[i, k]).log() for i in range(12) for k in range(6)) / 12
    else:
        seen = [net.forward_head(net.forward_features(images), pre_logits=True) for net in (model, teacher)]
        apart = (seen[0] - seen[1]).square().mean()
    smooth = 0.9 * nn.functional.one_hot(labels, 6) + 0.1 / 6
    right = -(smooth * answers.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, 0.7 * right + 0.3 * apart, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [SOFT, vltok.TAP(), vltok.ADL()])
@pytest.mark.parametrize("by", ["logits", "features"])
def test_a_student_follows_its_teacher_and_not_the_labels(task, by, method):
    teacher, _ = SPEC.build(5, 6)
    with torch.no_grad():
        teacher.head.weight.mul_(40)
    student, handle = SPEC.build(6, 6, (method,))
    student.head.load_state_dict(teacher.head.state_dict())
    ((images, _),) = task.test_batches()
    before = [p.clone() for p in teacher.parameters()]

    def apart():
        with torch.no_grad():
            return (student.eval()(images) - teacher.eval()(images)).square().mean()

    start = apart()
    recipe = Recipe(steps=40, batch_size=12, lr=3e-3, distill=1.0, distill_by=by, temperature=1.0)
    _, result = fit(student, handle, task, recipe, 0, teacher=teacher)
    assert apart() < 0.6 * start and result["curve"][0]["step"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_weights_are_of_the_model_without_methods_or_with_them(tmp_path):
    plain, (soft, _) = SPEC.build(0, 6)[0], SPEC.build(0, 6, (SOFT,))
    with torch.no_grad():
        plain.head.weight.add_(1)
        soft.blocks[0].attn.W_q.weight.add_(1)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    save_file(soft.state_dict(), tmp_path / "soft.safetensors")
    for name in ("plain.safetensors", "plain.pth"):
        model, _ = SPEC.build(1, 6, (SOFT,), tmp_path / name)
        assert torch.equal(model.head.weight, plain.head.weight)
        # queries start from the mean of queries and keys of the file, so the file was read before the method came
        torch.testing.assert_close(
            model.blocks[0].attn.W_q.weight, plain.blocks[0].attn.qkv.weight[:32].unflatten(0, (2, 16)).mean(0)
        )
    model, _ = SPEC.build(1, 6, (SOFT,), tmp_path / "soft.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in soft.state_dict().items())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file(SPEC.build(0, 6)[0].state_dict(), tmp_path / "plain.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing")
    (tmp_path / "text.pth").write_text("nothing")
    torch.save({"f": nn.Linear(1, 1)}, tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"2 of another shape: head\.bias, head\.weight"):
        SPEC.build(0, 4, (), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"missing: .*1 unknown: x"):
        SPEC.build(0, 6, (), tmp_path / "x.safetensors")
    for name in ("text.safetensors", "text.pth", "module.pth"):
        with pytest.raises(ValueError, match="no file of weights that can be read safely"):
            SPEC.build(0, 6, (), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file of weights"):
        SPEC.build(0, 6, (), tmp_path / "none.pth")


def test_unknown_models_and_arguments_are_refused_and_known_ones_near_are_named():
    with pytest.raises(ValueError, match=r"near it: .*vit_tiny_patch16_224"):
        ModelSpec("vit_tiny_patch16_22").create(0, 2)
    with pytest.raises(ValueError, match="can't make vit_tiny_patch16_224"):
        ModelSpec("vit_tiny_patch16_224", {"colour": 3}).create(0, 2)
    with pytest.raises(ValueError, match="no model 'hf-hub:timm/x'"):
        ModelSpec("hf-hub:timm/x").create(0, 2)


def test_backbones_of_vltok_are_among_the_models():
    assert type(ModelSpec("soft_tiny").create(0, 3)).__module__.startswith("vltok.models")
